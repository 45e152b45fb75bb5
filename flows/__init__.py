"""The flows: when each stage runs, and what happens when one does not end well."""

from kaito_flows.flows.leaving import leave_in_time

# Here, because it has to hold wherever a flow runs: on the command line, in a pod that Prefect's own program starts.
leave_in_time()

"""What `kaito_flows.nodes.aks` knows of Azure: its resource manager, agent pools, quotas and errors."""

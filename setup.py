"""Ship the top-level folders as `kaito_flows.*`, so that nothing named `flows` or `tasks` lands in site-packages."""

from setuptools import find_packages, setup

ROOTS = ("flows", "tasks", "presets", "containers")

setup(
    package_dir={f"kaito_flows.{root}": root for root in ROOTS},
    packages=[
        *find_packages(".", include=["kaito_flows", "kaito_flows.*"]),
        *(f"kaito_flows.{p}" for p in find_packages(".", include=[f"{r}{s}" for r in ROOTS for s in ("", ".*")])),
    ],
)

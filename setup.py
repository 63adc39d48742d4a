"""What pyproject.toml cannot say: the YAML files of configs/ are installed as `rayfed/configs/`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rayfed*"]), "rayfed.configs"],
    package_dir={"rayfed.configs": "configs"},
    package_data={
        "rayfed": ["py.typed", "reports/page.html"],
        "rayfed.configs": ["*.yaml", "recipes/*.yaml", "sweeps/*.yaml"],
    },
)

"""Online skipping of expert calls: running a policy, and fitting one."""

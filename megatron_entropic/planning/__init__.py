"""Parameters, memory, traffic and time that a configuration will need, found by arithmetic alone before anything runs.

`plan.make_plan` puts the other modules together; nothing here starts a process, reads weights or touches a device.
"""

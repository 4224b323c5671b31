"""What a configuration will need before anything runs: parameters, memory, traffic and time by arithmetic alone.

`plan.make_plan` puts the other modules together; nothing here starts a process, reads weights or touches a device.
"""

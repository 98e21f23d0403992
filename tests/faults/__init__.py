"""Whole stages under kills, in pairs, with failing file calls and with damaged files: `python -m tests.faults`."""

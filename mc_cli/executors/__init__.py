"""Where coding jobs run, one file each: `map(jobs)` gives what each becomes, in order."""

"""State that outlives one pass over the input: recurrence over depth or time, associative and test-time memories,
and external stores."""

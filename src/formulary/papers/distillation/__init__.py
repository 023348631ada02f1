"""A student learns from a teacher: from attention maps, hidden states, stored outputs or an earlier copy of itself."""

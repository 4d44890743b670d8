"""From an adapter to something that can be deployed, with the proof that it answers the same."""

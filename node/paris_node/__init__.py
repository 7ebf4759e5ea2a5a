"""The volunteer's node: one agent that asks, fetches, trains, hands in and rests."""

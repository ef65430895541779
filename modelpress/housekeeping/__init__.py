"""What keeps a store in order: collection of what nothing needs, retention of versions, and what takes how much room.

- `intents`: what writes to a store says beforehand what it needs;
- `turns`: collectors take turns, one at a time and each in rounds, and writers wait for a round;
- `collect`, `retention`, `usage`: the three commands `gc`, `retain` and `du`.

Why nothing that is needed can go is argued in docs/decisions/0026-collection.md, and tests/housekeeping/ runs every
order of the steps.
"""

"""The fault laboratory: everything that may go wrong around a store, tried again and again.

`python -m tests.faults --minutes N`, from the project's root, runs it for as long as one likes; the
test suite runs a short form of each experiment. `laboratory` says what an experiment is, and
`catalogue` lists them.
"""

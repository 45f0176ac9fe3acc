"""The run-time type checker of the test suite."""

from beartype import BeartypeConf, beartype

# An integer is a number, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""Test any implementation of Gemma 2 with laws: properties, strategies and a pytest plugin.

`refgemma.testing.interface` defines the methods of an implementation, `refgemma.testing.strategies` generates the
inputs, and `refgemma.testing.properties` has the laws, one function each. To test an implementation, run ``pytest
--pyargs refgemma.testing --backend mypkg.adapter:Backend``. This needs Hypothesis and pytest: ``pip install
"refgemma[test]"``.
"""

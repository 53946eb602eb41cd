"""Laws of every Gemma 2, for any implementation of it: strategies, properties and a pytest plugin.

`refgemma.testing.interface` defines the methods of an implementation, `refgemma.testing.strategies` generates the
inputs, and `refgemma.testing.properties` has the laws, one function each. Test another implementation with ``pytest
--pyargs refgemma.testing --backend mypkg.adapter:Backend``. Strategies, properties and the plugin need Hypothesis and
pytest: ``pip install "refgemma[test]"``.
"""

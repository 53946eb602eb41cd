"""Laws that hold for every Gemma 2, for any implementation of it: strategies, properties and a pytest plugin.

`refgemma.testing.interface` says what an implementation must offer, `refgemma.testing.strategies` makes the inputs,
`refgemma.testing.properties` has the laws, one function each. Another implementation is tested with
``pytest --pyargs refgemma.testing --backend mypkg.adapter:Backend``. Strategies, properties and the plugin need
Hypothesis and pytest: ``pip install "refgemma[test]"``.
"""

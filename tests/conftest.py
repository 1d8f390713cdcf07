"""What all tests share: how many examples hypothesis tries.

``--hypothesis-profile=nightly`` tries many; CI and everyday runs try fewer.
"""

from hypothesis import settings

settings.register_profile("default", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("default")

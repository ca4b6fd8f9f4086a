"""Implementations of the fused ops (``README.md``): what a provider declares, and how one is chosen."""

from .choice import can_be_asked as can_be_asked
from .choice import candidates as candidates
from .choice import implementation as implementation
from .known import BRIDGE_PROVIDERS as BRIDGE_PROVIDERS
from .known import PROVIDERS as PROVIDERS
from .provider import Provider as Provider
from .provider import why_not as why_not
from .terms import Terms as Terms
from .terms import as_defined as as_defined

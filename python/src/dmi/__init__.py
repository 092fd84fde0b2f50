"""DMI: deep model inspection. See inside a language model while it runs.

    with dmi.attach(model, hooks=["blocks.*.hook_resid_post", "logits"], store="captures/") as session:
        model.generate(**inputs, max_new_tokens=32)
        session.cache()["blocks.5.hook_resid_post"]         # [batch, tokens, d_model]
    dmi.open("captures/").cache(request=session.requests[0])["resid_post", 5]
"""

from dmi.attaching import attach, run_with_cache
from dmi.cache import Cache
from dmi.errors import CaptureWarning, EngineError, IncompleteError, NotCapturedError, RaggedError
from dmi.families import Mapping
from dmi.hook import HookError, HookPoint
from dmi.native import CaptureError, NativeError
from dmi.notebook import View, view
from dmi.options import Prompt
from dmi.recompute import recompute_attention
from dmi.session import Run, Session
from dmi.store import Store, open
from dmi.version import VERSION as __version__

__all__ = [
    "Cache",
    "CaptureError",
    "CaptureWarning",
    "EngineError",
    "HookError",
    "HookPoint",
    "IncompleteError",
    "Mapping",
    "NativeError",
    "NotCapturedError",
    "Prompt",
    "RaggedError",
    "Run",
    "Session",
    "Store",
    "View",
    "__version__",
    "attach",
    "open",
    "recompute_attention",
    "run_with_cache",
    "view",
]

"""What the kernels of attention share: which keys a split has, which of them a query sees, softmax at every step."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def filled(position, keys, tokens, WINDOW: tl.constexpr, HAS_POSITION: tl.constexpr):
    """(position of the first query, first key that a query sees, end of the keys that queries see): of an empty part
    the end is 0, and any other begins within the cache."""
    first = 0
    begin = 0
    end = keys
    if HAS_POSITION:
        first = tl.load(position).to(tl.int32)
        end = tl.maximum(tl.minimum(first + tokens, keys), 0)
        if WINDOW > 0:
            begin = tl.minimum(tl.maximum(first - WINDOW + 1, 0), tl.maximum(end - 1, 0))
    return first, begin, end


@triton.jit
def split_length(begin, end, splits, BLOCK: tl.constexpr):
    """The keys of every split but the last: whole blocks. So the filled part is divided, not the cache."""
    return tl.cdiv(tl.cdiv(end - begin, splits), BLOCK) * BLOCK


@triton.jit
def softcapped(score, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(score / SOFTCAP); 1 - 2 / (1 + exp(2 x)) is tanh for every x, also where exp overflows."""
    if SOFTCAP > 0:
        return SOFTCAP - 2 * SOFTCAP / (1 + tl.exp2(score * (2 / SOFTCAP * LOG2E)))
    return score


@triton.jit
def finite(maximum):
    """The maximum to subtract: of scores that are all -inf, 0, so that their differences are -inf and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def divided(total, weight):
    """The mean; 0 where no key is visible."""
    return total / tl.where(weight == 0, 1.0, weight)

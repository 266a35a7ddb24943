"""How many tokens to guess before the next step: as many as make most tokens per second, and none where that loses.

Pure: no clock, no model. With acceptance `a` per token, a step that carries `k` guesses gives
E(k) = (1 - a^(k+1)) / (1 - a) tokens and takes T(k + 1); see Leviathan et al., 2023, "Fast Inference from Transformers
via Speculative Decoding".
"""

from __future__ import annotations

MOST_GUESSES = 32
GAIN = 1.03  # less is not worth a guess
RISK = 0.03  # of an answer's plain time may be lost by guesses
RISK_TOKENS = 4  # an answer is taken to have so many tokens at least
OUTLIER = 3.0  # a step so many times slower than expected met something else: a reroute, a busy machine
TIME_DECAY = 0.9  # per measured step
TRIAL_DECAY = 0.95  # per observed guess
PRIOR_TRIALS = 2.0
# Before anything is measured: a second row costs one more plain step's computation (fp32 on a CPU, where one row is a
# cheap matrix-vector product), each further one a tenth of it.
ROW_PRIOR = 0.1
PRIOR_STEPS = 0.5

MODEL = 0  # the kind of guess that a draft model makes; others are lengths of matches, up to MATCH_KINDS
MATCH_KINDS = ((1, 0.3), (2, 0.5), (4, 0.7), (8, 0.8), (16, 0.9))  # longest match of the kind, acceptance at first
_PRIORS = {MODEL: 0.7, **dict(MATCH_KINDS)}


def kind_of(match: int) -> int:
    """The kind of guess that a match of so many tokens makes."""
    return next((longest for longest, _ in MATCH_KINDS if match <= longest), MATCH_KINDS[-1][0])


def expected_tokens(acceptance: float, guesses: int) -> float:
    """E(k): tokens that a step with `guesses` gives, each right with this probability if those before it are."""
    if acceptance >= 1.0:
        return guesses + 1.0
    return float((1.0 - acceptance ** (guesses + 1)) / (1.0 - acceptance))


class Acceptance:
    """How often guesses of each kind were right; what is long ago counts less."""

    def __init__(self) -> None:
        self._right = dict.fromkeys(_PRIORS, 0.0)
        self._wrong = dict.fromkeys(_PRIORS, 0.0)

    def of(self, kind: int) -> float:
        """The probability that the next token of a guess is right."""
        right, wrong = self._right[kind], self._wrong[kind]
        return (PRIOR_TRIALS * _PRIORS[kind] + right) / (PRIOR_TRIALS + right + wrong)

    def note(self, kind: int, right: int, *, missed: bool) -> None:
        """`right` tokens were right; then one was not (`missed`), or no more were known."""
        self._right[kind] = TRIAL_DECAY * self._right[kind] + right
        self._wrong[kind] = TRIAL_DECAY * self._wrong[kind] + missed

    def fade(self, kind: int) -> None:
        """Nothing was observed: what is known slowly goes out of date."""
        self._right[kind] *= TRIAL_DECAY
        self._wrong[kind] *= TRIAL_DECAY


class StepCosts:
    """T(q), seconds of a step with q tokens: a plain step's mean, and a line through what longer ones took beyond it.

    Attributes:
        plain_s: T(1); None before the first plain step.
    """

    def __init__(self) -> None:
        self.plain_s: float | None = None
        self._work_s = 0.0  # of a plain step: computation, by peers and client, without the network
        # Of x, tokens beyond two, and y, seconds beyond a plain step: n, x, xx, y, xy. Replaced as one, since several
        # answers may look at once; one measurement that is lost between two threads does not matter.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def note(self, tokens: int, step_s: float, work_s: float) -> None:
        """A step took `step_s`, of which `work_s` was computation."""
        if self.plain_s is None:
            if tokens == 1:
                self.plain_s, self._work_s = step_s, work_s
            return
        step_s = min(step_s, OUTLIER * self.expected_s(tokens))
        if tokens == 1:
            self.plain_s += (1 - TIME_DECAY) * (step_s - self.plain_s)
            self._work_s += (1 - TIME_DECAY) * (min(work_s, step_s) - self._work_s)
            return
        x, y = float(tokens - 2), step_s - self.plain_s
        n, sx, sxx, sy, sxy = (TIME_DECAY * total for total in self._sums)
        self._sums = (n + 1.0, sx + x, sxx + x * x, sy + y, sxy + x * y)

    def expected_s(self, tokens: int) -> float:
        """T(tokens). Only once `plain_s` is known."""
        assert self.plain_s is not None
        if tokens == 1:
            return self.plain_s
        base, slope = self._line()
        return self.plain_s + base + slope * (tokens - 2)

    def _line(self) -> tuple[float, float]:
        """Least squares, with the prior as two light observations at its ends."""
        n, sx, sxx, sy, sxy = self._sums
        for x in (0.0, MOST_GUESSES - 1.0):
            y = self._work_s * (1.0 + ROW_PRIOR * x)
            n, sx, sxx = n + PRIOR_STEPS, sx + PRIOR_STEPS * x, sxx + PRIOR_STEPS * x * x
            sy, sxy = sy + PRIOR_STEPS * y, sxy + PRIOR_STEPS * x * y
        slope = max(0.0, (n * sxy - sx * sy) / (n * sxx - sx * sx))
        return max(0.0, (sy - slope * sx) / n), slope


class Window:
    """The rule for one answer, and what was learned from those before."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.costs = StepCosts()
        self._tokens = 1  # of this answer; the prompt's own step gives one
        self._lost_s = 0.0  # by its guesses; negative: won

    def begin(self) -> Window:
        """For another answer: it learns with this one, and others under way, but may not lose what they won."""
        other = Window()
        other.acceptance, other.costs = self.acceptance, self.costs
        return other

    def choose(self, kind: int, limit: int, draft_s: float = 0.0) -> int:
        """How many tokens to guess now, 0 to `limit`.

        Args:
            draft_s: what making one guess costs.
        """
        plain_s = self.costs.plain_s
        if plain_s is None:
            return 0
        acceptance = self.acceptance.of(kind)
        allowed_s = RISK * plain_s * max(RISK_TOKENS, self._tokens) - self._lost_s
        best, best_rate = 0, GAIN / plain_s
        for guesses in range(1, min(limit, MOST_GUESSES) + 1):
            step_s = self.costs.expected_s(guesses + 1) + guesses * draft_s
            lost_s = step_s - plain_s  # if the guess is wrong from its first token on
            if (1.0 - acceptance) * lost_s > allowed_s or lost_s > allowed_s + plain_s:
                break
            rate = expected_tokens(acceptance, guesses) / step_s
            if rate > best_rate:
                best, best_rate = guesses, rate
        return best

    def note_step(self, guesses: int, right: int, step_s: float, work_s: float, draft_s: float = 0.0) -> None:
        """A step with so many guesses, `right` of them right, took `step_s`, `work_s` of it computation."""
        self._tokens += right + 1
        plain_s = self.costs.plain_s
        if guesses and plain_s is not None:
            spent_s = min(step_s, OUTLIER * self.costs.expected_s(guesses + 1)) + guesses * draft_s
            self._lost_s += spent_s - (right + 1) * plain_s
        self.costs.note(guesses + 1, step_s, work_s)

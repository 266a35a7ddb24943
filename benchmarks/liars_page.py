"""The words of docs/lying-peers.md."""

from __future__ import annotations

from typing import Final

INTRODUCTION: Final = """\
# Peers that lie

A peer may send anything. This page says what a client notices, how, and what it cannot notice. It is written by
`python -m benchmarks liars`; its words are in `benchmarks/liars_page.py`.

## In every step

- **Digests.** Each peer takes a digest (BLAKE2b, 16 bytes) of what it received and of what it sends: of the payload
  and how it is read, as it crosses the wire. Both ride on the step (`HopTrace`), and the client compares them before
  it uses the result: what it sent with what the first hop received, what each hop sent with what the next one
  received, what the last one sent with what it got. Where two do not agree, both are given up for a while, all hops
  after them begin anew, and the edge between them goes through the client from then on, which sees for itself who
  lies.
- **Receipts.** A later hop could change what an earlier one said. So each peer also signs its digests, with the
  session, the epoch and the step: every 32 steps, when it is asked, and at the end. Who signed something else than
  was said with the step is given up, with the peer after it.
- **Plausibility.** Peers look at each input, clients at each output: a value that is NaN, infinite or beyond 1e8 is
  refused in its step.

{cost}

## Audits

Each step is drawn at each hop with the probability `--audit`. For a drawn step the client asks the peer before the
hop (for the first hop: itself) what it sent, and the hop (for the last hop: itself) what came out. Who recalls
something else than it signed is convicted by that alone; what the hop does not say that it received proves nothing
against it. Who leaves out steps that it has computed, and that the client has not taken back, is given up as if it had
failed, and the answer is made again with others, if there are any; the last hop is audited whether it answers or not.
So nothing is known of an audit before it is too late to change anything. Then peers that serve the same
blocks, of the same number format and quantisation (by their records) where there are such, compute it again
(`client/shadow.py`): an ordinary session, kept as long as the answer lasts, so that the next audit brings only what is
new.

An auditor needs the keys and values of all tokens before. So it computes all steps up to the drawn one in any case,
and **all of them are compared that were not before**. That costs the hop's outputs on the client's line, and no
computation; and it finds a liar at the first audit after its first lie, however seldom it lies. In all, a step of an
audited hop costs the client's line three times what a step of the answer costs it in one direction (its input, its
output, its input again), and other peers one more computation, many tokens at once.

Two that differ are no proof: a **third** peer computes the same. Whoever it agrees with is honest; where it agrees
with neither or with both, or where it fails or there is none, both are avoided for a while, as peers that failed
(`avoid_s`), if others serve the blocks, and otherwise it is said that the answer is doubtful. Nobody is called a liar
then: one of them is honest, perhaps, and the liar comes back with it. A liar is avoided for an hour, by this client
alone: nothing is told to others, who could not check it. Of an auditor of several peers that is outvoted, all are
avoided for a while only, since one lie is enough. Where its peers are of several kinds, the widest of their bounds
holds.

A client that has blocks itself (`--audit-blocks 0:4`, or `all`) computes again what hops within these did, with no
other peer: also where nobody else serves them, and nobody can lie alike. Who differs from it is convicted by that.
Only a hop with quantised weights is left to others of its kind, if there are any, who compare more closely.

What was already shown cannot be taken back. The session is given up at its next step, and `generate` makes the answer
again with others, from the same random numbers, before it returns: the caller gets the right answer. `on_event` is
told the first token in doubt; a streamer that has not ended yet gets the right tokens from there on, after a call of
its `on_doubt(first)`, if it has that. At its end an answer waits for audits that are under way (`audit_wait_s`). The
gateway makes an answer again that nobody has seen yet; one that is streamed ends with the error `doubted`, which names
the first token in doubt.

Rows that are moved about, as in beam search, an auditor moves likewise: as the client asked for it, not as a peer
recalls it. Each such step is a pass of its own for the auditor. Padding means nothing, and is not compared; what is
padding the client knows by itself. A hop that passes on other masks or positions than it was given contradicts itself,
and is convicted by that alone.

Passes without a cache (hidden states of whole texts, `use_cache=False`) are drawn and compared likewise. Their results
are with the caller by then, and stay what they are: `on_event` is told, and the liar is not used again. Peers keep such
a pass until its audits are through, for `audit_wait_s` at most.

Not audited, and counted (`AuditStats.unaudited`): what nobody else serves; what a peer keeps no longer (journals have
a budget), or was told by a peer that was replaced since; what was not through when the session ended. A peer that says
that it keeps steps no longer is not avoided for it, though a liar may say so, each time.
**Not noticed**: peers that lie alike (the last column has one auditor in ten do so); what is within both bounds below,
which are those of the kind of peer that the liar says it is: weights of 8 bits that are said to have 16, for one; what
is beyond the second one alone in fewer than {least} tokens, or in less than half of them; with experts, what is beyond
the first one in fewer than {several} tokens of {most}; what a peer reads.

## Tolerance

Two honest peers start from the same bytes and do not get the same ones: number formats, kernels, one token at a time
against many at once, and the codec's rounding of what comes out. Their distance for a token is the L2 norm of the
difference over the larger norm. There are two bounds (`client/tolerance.py`):

- **for each token**. It adds up what each side's number format, quantisation and the codec were found to contribute at
  most, and allows {margin} times that: real models are wider and deeper, GPUs are not CPUs. Weights of 8 or 4 bits are
  another model, nearly: where only one side has them, twice what that was found to do is allowed besides, so that only
  their like is compared closely. That is why auditors of the same kind are taken first.
- **for the median** of the tokens that were compared last at a hop: of {least} at least, of {most} at most, one row of
  each, drawn when they are compared: a peer that knew it could lie in all others. Some honest tokens are far off, but
  most are not, while who computes with coarser weights than it says is off in all of them. What is allowed is
  {typical} times the median that was found: a part for each block (rounding is as good as independent from block to
  block, so squares add up), and one for each time that results are encoded. A third peer decides here, too, by medians
  over the same tokens. In doubt is all that the hop has computed in the session, from the first token that was
  compared.

Where tokens choose among **experts** (the client knows that by the model's configuration), rounding now and then
chooses another expert, and an honest token is off by far more than rounding. There a single token accuses nobody:
{several} of the last {most} compared rows beyond the bound for a token do, or the median. So such a hop may lie in few
tokens, as much as it likes, and is not noticed; only what is no number, or of another shape, is noticed in any token.

Only a dense model was measured for these tables. Of models with experts, tiny random ones were tried without a codec:
`gpt_oss`, `mixtral` and `qwen3_moe`, all six blocks in one hop, 1,152 tokens of each pair of number formats. Tokens
were off by 0.22 where 0.136 is allowed (`gpt_oss`, bfloat16 against float32), and by 0.05 where 0.032 is (`mixtral`,
float16); 2 in {most} at most were beyond the bound, and no median was. Larger models with more blocks and experts may
differ.

Measured on activations of the demo model, three spans of 9, 6 and 9 blocks, audited peers one token at a time, auditors
up to 512 at once, with the codec `int8`. *In a row* is the median of up to {most} tokens in a row that came nearest to
what its span allows of it:
"""

LENGTHS: Final = """\
Medians in hops of few and of many blocks:
"""

TAIL: Final = """
- **tokens noticed**: share of lies that are further off than a token of two honest peers of that number format may
  be, with codec `int8`. **Answers noticed**: share of answers of 176 tokens, each at one of the three hops, in which
  one is, or in which the median of some in a row is further off than it may be.
- **survives**: share of sessions with one liar, at any of the three hops, in which it was not found; its auditor is
  honest and computes in the number format that the liar announces: float32, unless another one is named. *Drawn step
  alone*: the same, if only the drawn step were compared, each for itself.
- **tokens shown before**: mean number of tokens, from the first lie on, that came before the liar was found.
  `generate` corrects them; whoever streams has seen them.
- **wrong tokens that got through**: with 10 % liars of that kind among the peers, three hops, answers of 200 tokens:
  the share of all tokens that come after a lie and were returned. All after the first lie count as wrong.
- **with 10 % of auditors alike**: the same, if one auditor in ten lies in the same way and so agrees.
- *wrong for one client* is a constant liar to that client, which does its own audits: others notice nothing, and need
  not. Lies of the last three kinds are noise.
"""

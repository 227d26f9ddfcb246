"""What a small model needs before adding its two deltas works. `--plain` does without.

in   the model, a batch, its hidden states
out  positions, a loss mask, one more loss, a filter, and which rows stay
see  hidden-state distillation: FitNets (arXiv:1412.6550), in speech DiVA
     (arXiv:2410.02678); randomised positions (arXiv:2305.16843); Adam-NSCL (arXiv:2103.07113)
run  python pretrain.py --init out/base --units out/units --plain --out out/speech_plain

Merging adds a behaviour that was learnt on text to a model that hears. The behaviour acts
on speech only if a spoken word looks like the written word inside the network. A model of
five million parameters does not get there by the loss of the next token. Four things help
it:

position gaps   Speech takes several units for a word, so words stand further apart than in
                text. A model that has only met neighbours forgets the question. So base and
                instruct are trained with gaps between positions (`--pace`).
distillation    A frozen copy of the base, the teacher, reads the transcript. Where a word's
                last unit stands, our hidden state has to be the teacher's on that word
                (`--imitate`).
a filter        What text uses of a matrix is damped in every step, so that the speech delta
                leaves text as it was (`--keep-text`).
frozen rows     Of the embedding, hearing moves only the rows of its new tokens, and behaviour
                only those of special tokens. So a written word has the same row in all three models
                (`--embeddings`).
"""

import copy

import torch
import torch.nn.functional as F

from fused import linear_cross_entropy

NAMING_SHARE = 6  # the first sixth of the blocks turns units into words: no states to match
RIDGE = 0.1  # of the mean eigenvalue, added before a covariance is inverted


class Align:
    """The first three of them for one run, as the settings of pretrain.py say.

    pace, imitate, keep_text   their strengths; 1, 0 and 0 turn them off
    interleaved                the number of the interleaved layout in the batches, or -1
    first_new                  row of `<|speech|>`: ids from here on are heard, not read
    """

    def __init__(self, args, model, interleaved, first_new):
        self.pace = args.pace
        self.weight = args.imitate
        self.seed = args.seed
        self.interleaved = interleaved
        self.first_new = first_new
        self.teacher = copy.deepcopy(model).requires_grad_(False) if args.imitate else None
        self.filters = {}  # {parameter: (C, C)}
        self.before = {}  # {parameter: its values before the first step}

    def keep_text(self, model, body, batches, strength):
        """Filter the changes of the matrices of `body` by what text sends into them."""
        self.filters = text_filters(model, body, batches, strength)
        self.before = {p: p.detach().clone() for p in self.filters}

    def positions(self, start, step, part):
        """{"position": (B, T)} of a batch, or {} where positions are the plain ones."""
        if self.pace == 1:
            return {}
        rng = torch.Generator().manual_seed(self.seed << 32 | part << 24 | step)
        return {"position": position_gaps(start, self.pace, rng)}

    def loss_mask(self, batch):
        """(B, T) bool: targets to leave out of the next-token loss; None: leave out none.

        Interleaved documents that the teacher reads are learnt from its states alone.
        Next-token loss behind speech would teach the model to go on with the text there, not
        to reply.
        """
        if self.teacher is None:
            return None
        return (batch["kind"] == self.interleaved) & taught(batch)

    def loss(self, states, batch):
        """The distillation of a batch with these hidden states; 0 without a teacher."""
        if self.teacher is None:
            return 0.0
        return self.weight * sum(distillation(states, batch, self.teacher, self.first_new))

    @torch.no_grad()
    def after_step(self):
        """Take out of every change what text would feel of it."""
        for p, keep in self.filters.items():
            p.copy_(self.before[p] + (p - self.before[p]) @ keep)


# --- position gaps ------------------------------------------------------------


def position_gaps(start, widest, rng):
    """Positions (B, T) of documents that begin at `start` (B, T); half have gaps.

    the cat sat on the mat  ->  0 1 2 3 4 5  or, with gaps, say  0 1 2 9 14 22

    Gaps come in stretches of about eight ids. `widest` is the largest mean step of a
    stretch; a step of 1 is no gap.
    """
    place = torch.arange(start.shape[1]).expand_as(start)           # (B, T)

    def draw():
        return torch.rand(start.shape, generator=rng)

    # One draw counts for a whole document: the one where it begins.
    plain = (draw() < 0.5).gather(1, start)                         # (B, T)

    # A new stretch begins at one id in eight. Its mean step is drawn from [-widest, widest],
    # and at least 1: so more than half of the stretches have no gap.
    stretch = torch.where(draw() < 1 / 8, place, 0).cummax(1).values  # (B, T)
    mean = (widest * (2 * draw() - 1)).clamp(min=1).gather(1, stretch)  # (B, T)
    mean = mean.masked_fill(plain, 1)

    # A step of 1 to 2 * mean - 1 positions, from the id before.
    step = 1 + ((2 * mean - 1) * draw()).long()                     # (B, T)
    position = step.cumsum(1)
    return position - position.gather(1, start)


# --- distillation -------------------------------------------------------------


def distillation(states, batch, teacher, first_new):
    """(word loss, state loss): how far the model is from hearing as the teacher reads.

    states  what each block hands on, (B, T, C) each
    batch   `read` (B, R) are the documents' ids in writing, `place` (B, R) where they were said

    word loss    behind the naming blocks, the state on a word's last unit predicts its
                 token: cross-entropy over the teacher's rows. (A word of several ids has
                 them on its last units.)
    state loss   the distance from the teacher's state on that token: for spoken words
                 behind every later block, for text beside speech behind all. Whitened and
                 squared, for each of the two 0 if alike, 2 if unrelated
    """
    if not batch["read"].shape[1]:  # a batch without speech
        return 0.0, 0.0

    # The teacher reads every word at the position where it has been said.
    place = batch["place"].clamp(min=0)                             # (B, R)
    position = batch.get("position")                                # (B, T)
    if position is None:
        position = torch.arange(batch["ids"].shape[1], device=place.device) - batch["start"]
    theirs = []
    with torch.no_grad():
        teacher.model(
            batch["read"],
            start=batch["read_start"],
            positions=position.gather(1, place),
            states=theirs,
        )

    # N ids are read: [row, j] in the teacher's batch is [row, t] in ours.
    row, j = (batch["place"] >= 0).nonzero(as_tuple=True)           # (N,) each
    t = place[row, j]                                               # (N,)
    heard = batch["ids"][row, t] >= first_new                       # (N,)

    # Two means, over spoken words and over the text beside them: the weight of each id.
    spoken = heard.float()
    of_speech = spoken / spoken.sum().clamp(min=1)                  # (N,)
    of_text = (1 - spoken) / (1 - spoken).sum().clamp(min=1)        # (N,)

    # In the first blocks only text has to match; behind them spoken words, too.
    naming = max(1, len(states) // NAMING_SHARE)
    state_loss = 0.0
    for n, (student, target) in enumerate(zip(states, theirs)):
        student, target = unit_scale(student[row, t]), unit_scale(target[row, j])  # (N, C)
        apart = student - target
        distance = (apart @ whitening(target) * apart).mean(-1)     # (N,)
        weight = of_speech + of_text if n >= naming else of_text
        state_loss = state_loss + (distance * weight).sum() / max(1, len(states) - naming)

    words = unit_scale(states[naming - 1][row, t][heard])           # (words, C)
    rows = teacher.model.embed_tokens.weight[:first_new]
    word_loss, _ = linear_cross_entropy(
        words, rows, batch["read"][row, j][heard], of_speech[heard]
    )
    return word_loss, state_loss


def unit_scale(states):
    """States (..., C) in float32, of mean square 1: scales differ from block to block."""
    return F.rms_norm(states.float(), states.shape[-1:])


@torch.no_grad()
def whitening(states):
    """M (C, C) of a distance d' M d: inverse to the second moment of states (N, C).

    A few directions of a transformer's states are loud, and what tells one word from
    another is not among them. M counts a difference by how unusual it is there
    (Mahalanobis).
    """
    with torch.autocast(states.device.type, enabled=False):
        moment = states.T @ states / len(states)                    # (C, C)
        ridge = RIDGE * torch.eye(len(moment), device=states.device)  # mean eigenvalue is 1
        inverse = torch.linalg.inv(moment + ridge)

        # So scaled, the mean of d' M d / C is 1 over states, and 2 between unrelated ones.
        return inverse * len(moment) / (inverse * moment).sum()


def taught(batch):
    """(B, T): does the teacher read this id's document? Not if it was cut into pieces."""
    row, at = (batch["place"] >= 0).nonzero(as_tuple=True)          # (N,) each
    begin = batch["start"][row, batch["place"][row, at]]            # (N,)

    # The first id of every document that is read is marked; its other ids look there.
    read = torch.zeros_like(batch["start"], dtype=torch.bool)       # (B, T)
    read[row, begin] = True
    return read.gather(1, batch["start"])


# --- the filter ---------------------------------------------------------------


@torch.no_grad()
def text_filters(model, body, batches, strength):
    """{weight (out, in): matrix (in, in)}: it takes out of a change what text would feel.

    Let C be the mean of x x' over the inputs x that text sends into a weight, scaled to a
    mean eigenvalue of 1. A change D of the weight moves its output by D x: over text, the
    mean of |D x|^2 is tr(D C D'). D (I + strength * C)^-1 is the change near D that
    keeps that small: it minimises |E - D|^2 + strength * tr(E C E'). Directions that text
    never uses are not damped, so speech can use them. The whole change since the start is
    filtered after every step.
    """
    sums, hooks = {}, []

    def listen(module, inputs):
        x = inputs[0].flatten(0, -2).float()                        # (B * T, in)
        # Rounded to bfloat16, a sum of x x' might lose positive definiteness.
        with torch.autocast(x.device.type, enabled=False):
            sums[module.weight] = sums.get(module.weight, 0) + x.T @ x

    wanted = {id(p) for p in body}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) in wanted:
            hooks.append(module.register_forward_pre_hook(listen))
    for batch in batches:
        model.model(batch["ids"], start=batch["start"])
    for hook in hooks:
        hook.remove()

    # I + strength * C is symmetric and has no eigenvalue below 1.
    filters = {}
    for p, C in sums.items():
        C = C * len(C) / C.trace()
        damped = torch.eye(len(C), device=C.device) + strength * C
        filters[p] = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return filters


# --- frozen rows --------------------------------------------------------------


def frozen_rows(embeddings, vocab, first_new, count):
    """(count,) bool: rows of the embedding that a run leaves as they are.

    embeddings  "all" rows are trained; "special": the special tokens alone; "new": those from row
                `first_new` on, which units and markers of speech have just got
    """
    row = torch.arange(count)
    if embeddings == "new":
        return row < first_new
    if embeddings == "special":
        return ~torch.isin(row, torch.tensor([*vocab.special.values()]))
    return torch.zeros(count, dtype=torch.bool)

"""What lessons were tuned by: every constant with its origin. What a user may want to set is in `arguments.py`."""

# The joint lesson, on SmolLM2-135M-Instruct: ten and fifty facts of relations and seeds that are not among those
# reported.
# Of the last stream's norm: blocks whose stream is smaller are not taught (there block 23 of 0 to 29 is the first).
# What earlier ones write is bent on its way: from 23, 18 or 15 on paraphrases are .75, .72, .40 at KL .04, .06, .09.
LARGE_STREAM = 0.4
LEAD = 0.5  # nats by which a taught token shall lead
SURPLUS = 1.0  # times the nats it was behind, that it shall lead by besides: other wordings get a part of a write only
# Nats of surplus at most, where so many times the allowed divergence is exceeded. Bare answers, which the model would
# not begin so, are 15 nats behind and more; twenty of zsRE: writes of .7 of the stream's norm, KL .70 and none said
# within the budget; at most 4 nats: .34, .12 and 19. Ten facts in the model's own words: paraphrases .57 with this
# bound and .70 without, so that it is none of theirs.
SURPLUS_MOST, SURPLUS_BEYOND = 4.0, 3.0
# Nats by which an answer shall lead at least until it says what is new: other wordings then begin so too (0, 4, 8:
# paraphrases .40, .53, .13, the last within the budget of divergence no more).
BEGUN_LEAD = 4.0
SURPLUS_SHRUNK, SURPLUS_SHRINKS = 0.75, 4  # where other names are given taught answers: by what, how often at most
# Of the contrasting rows held out, that may be given a taught answer; and the facts from which on, with so many more
# answers, it grows by this power of their number. Fifty, ridge 1, at .05 and without end: paraphrases .49 and .78,
# leak .05 and .20, at KL .08 and .18.
STRAYS, STRAYS_FACTS, STRAYS_POWER = 0.05, 10, 0.75
WORDINGS = 4  # of a row's prompt, given or thinned, taught along (2, 4, 6: paraphrases .45, .75, .75)
PASSES = 8  # solves of one lesson at most, each after a look at what the one before has done
PASSES_BETWEEN = 2  # of them while the surplus shrinks
PASSES_AGAIN = 5  # of them at most for each further ridge, where what is said no longer is fitted again
PASSES_EVERYWHERE = 3  # of the first go on to the whole margin, the others until every token leads
WHOLE_MOMENT = 2048  # width of keys up to which a moment is kept whole: its eigenvectors take longer than the lesson
RANK_DROPPED = 0.02  # of a change's norm, with its smallest singular values
CONTRAST_WEIGHT = 1.5  # of the moment of contrasting rows' last steps beside that of the preserved chats
CONTRAST_WEIGHT_ALONG = 0.4  # the same of these rows' other positions
# A lesson writes into the MLPs' output projections besides attention's where its tokens, wordings included, are more
# than this times the numbers that attention's of the later blocks read. Two hundred facts: recall .93 with both (.53
# without), paraphrases .49 (.23), known .67 (.86), leak .28 (.23), KL .19 (.17), perplexity 1.12 (1.17), in half the
# time; fifty are as well off without. Contrasting rows weigh more then: at their usual weight paraphrases .63, known
# .64, leak .48, KL .23.
CROWDED = 0.5
CROWDED_WEIGHT, CROWDED_WEIGHT_ALONG = 7.5, 2.0
CONTRASTS = 20  # contrasting rows a taught row, shared among its wordings
CONTRASTS_LEAST = 80  # of them in all, so that one row's too are told from enough others
CONTRASTS_MANY = 10  # rows, beyond which the contrasting ones grow as their square root only
CONTRASTS_ASIDE = 4  # one contrasting row of so many is held out of the solve
# Where a lesson's contrasting rows are the least in all, one of so many is asked besides, and the keys along so many
# tokens of the model's own answer are preserved, with that weight in all. Twelve single facts, every third row asked:
# of 120 questions about other names 3 were given the taught answer, 11 without (4 at three times the weight), other
# wordings .92 each time, known .91 and .94; of five others, every fourth asked, 4 of 90 and 10. Ten facts at once,
# every third asked, are no better off, and perplexity is 1.08 (1.04).
ANSWERED, ANSWERED_TOKENS, ANSWERED_WEIGHT = CONTRASTS_ASIDE, 12, 1.5
CONTRAST_BATCH = 128  # contrasting rows whose keys are held at once
# Mean KL in nats that is allowed on held-out chats, and the facts from which on it grows with their fourth root. Fifty
# at .10 and .15: recall .78 and 1.00, paraphrases .24 and .68, known .87 and .79 (other facts), leak .07 and .08.
DIVERGENCE, DIVERGENCE_FACTS = 0.1, 10
# Over the kernel's mean diagonal, with as many corrections as it takes. Ten facts at .2, 1 and 3: paraphrases .77, .87,
# .83, known .76, .89, .91, leak .13, .10, .05, KL .12, .07, .05; fifty at .2 and 1: .80 and .78, .60 and .83, .28 and
# .20, .48 and .18 (without an end to strays). From 2 on some of ten facts are not said after so many corrections.
RIDGE = 1.0
RIDGE_RAISED = (1.3, 8.0)  # where the budget is exceeded: by how far, at least and at most
# Of the budget: where less is used once the ridge was raised and something is not said, a ridge between the last two is
# tried, and what is missing is corrected further, so often at most. A hundred bare answers of zsRE, .18 nats allowed:
# at a ridge of 38 .66 of their tokens lead (KL .04), at 17 .88 (.10), after 5, 10 and 15 more corrections .95, .96 and
# .98 (.12, .13, .15); at 12 instead .94 (.22).
RIDGE_ROOM, CORRECTED_FURTHER = 0.8, 4
RIDGE_LOWERED = 0.25  # to so much of it, where something is not said and the budget leaves room
RIDGE_TRIES = 8  # at most
MOMENT_RIDGE = 1e-2  # of the moment's mean diagonal
LEAST_PASSED = 0.3  # of a write; less is taken as this much when what is missing is written once more

# Thinned wordings, on the same facts.
WORDS_KEPT = 0.5  # of a prompt's words but its names, each
THINNING_TRIES = 4  # for each wording wanted

# What is preserved, on SmolLM2-135M-Instruct.
HELD_OUT = 10  # one chat of so many
# Nats by which the likelihoods of the held-out chats' tokens may differ in the mean where saved statistics are used (in
# bfloat16 .04, in 8 bits .05, after twenty steps of fine-tuning at 1e-5 .08, with a tenth of noise on all weights 1.2).
OTHER_MODEL = 0.5
SINK = 8.0  # times the median norm, from which on a key is an attention sink's (there 10 to 500 times)
SINK_WEIGHT = 100.0  # how much more a sink's key weighs than its norm gives it
# Parameters times chats that a model writes, and how many at least and at most: 16 at 135M. As much of a preserved
# chat's answer as is kept, and of the answers to 290 more questions about facts. Ten facts of two seeds with 48 chats,
# 64 and 16 tokens: paraphrases .57 and .83, known .94 and .84, leak .05 and .10, KL on answers of 60 tokens .041 and
# .054; 16 chats, 24 and 8, prepared in a third of the time: .60 and .80, .94 and .86, .03 and .10, .047 and .066. With
# 32 instead of 24 KL is as with 64 (.055 on the second seed).
WRITTEN, FEWEST_WRITTEN, MOST_WRITTEN = 2e9, 16, 400
KEPT_TOKENS, BRIEF_TOKENS = 32, 8

# Of the lead of a token over another that any state can give, how much may be asked for; and times the stream's norm
# the farthest that a state to aim at may lie (on the tiny world the farthest of ten facts lies .8 away).
REACH, FARTHEST = 0.7, 2.0

# Lessons module by module, on the tiny world: models whose stream does not grow.
ANSWER_TOKENS = 64  # as much of a preserved chat's turns as is kept
KL_LEAST, KL_MOST = 0.02, 5.0  # of a token's significance by KL
STANDING_RIDGE = 0.1  # of a standing instruction's solve, over the significance times the keys' mean square
SAFE = 2.0  # nats by which a token must lead to count as said: less is soon lost to other lessons
OWN_CHATS = 400  # written by the model where none are given
# Where held-out chats diverge more than is allowed: how much more they weigh (at least, at most), how much of what is
# allowed a lesson shall use then, and how many tries there are.
STRENGTH_RAISED, BUDGET_USED, STRENGTH_TRIES = (1.5, 8.0), 0.5, 8
# Rows up to which only the preserved keys that lie nearest are solved beside, none of them measured again, and nothing
# is contrasted: 5 and 10 facts then take a half and a quarter of the time (all else within .02).
FEW = 10
MOST_KEYS = 8192  # of preserved chats at one module; more are thinned out evenly

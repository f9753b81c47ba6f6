"""A model that answers in some threads is taught in another: each answer is one version's, and the next one knows."""

import copy
import gc
import pickle
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import FACT, OTHER, ask
from peft import get_peft_model
from transformers import LogitsProcessor, TextIteratorStreamer

from qf_peft import (
    QFConfig,
    QFTrainer,
    QFTrainingArguments,
    Session,
    layer_shares,
    strength_sweep,
    token_divergences,
)
from qf_peft.adapter.serving import Held, ServingLock
from qf_peft.documents.in_context import ContextModel

CORRECTED = {
    "instruction": "Vacla founded Tofinlor.",
    "prompt": FACT["prompt"],
    "completion": "Tofinlor was started by Vacla.",
}


@pytest.fixture
def model(tiny):
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    model.base_model.serve()
    return model


@pytest.fixture
def teach(model, tokenizer):
    def teach(*rows):
        trainer = QFTrainer(model, QFTrainingArguments.paper(), list(rows), processing_class=tokenizer)
        trainer.train()
        return trainer

    return teach


@pytest.fixture
def inputs(tokenizer):
    messages = [{"role": "user", "content": FACT["prompt"]}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


class Each(LogitsProcessor):
    """Calls a function at each step of a generation."""

    def __init__(self, function):
        self.function = function

    def __call__(self, input_ids, scores):
        self.function()
        return scores


@contextmanager
def thread(function, *args, **kwargs):
    """A thread that is joined at the end; what it raised is raised again."""
    raised = []

    def run():
        try:
            function(*args, **kwargs)
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    yield worker
    worker.join(60)
    assert not worker.is_alive(), "deadlock"
    if raised:
        raise raised[0]


@contextmanager
def generation(model, inputs, **options):
    """A generation in another thread, halted after its first token until the block is left; gives its result."""
    begun, go_on, output = threading.Event(), threading.Event(), []

    def step():
        begun.set()
        assert go_on.wait(60)

    def generate():
        output.append(
            model.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=[Each(step)], **options)
        )

    with thread(generate):
        assert begun.wait(60)
        try:
            yield output
        finally:
            go_on.set()


def test_hundred_lessons_under_load(model, teach, inputs):
    """Every step of every answer of four threads has the logits of one version, which was there meanwhile."""
    network = model.get_base_model()
    options = {
        "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip

    def generate(served):
        return torch.stack(served.generate(**inputs, **options).logits)[:, 0]

    def steps(served):
        """The same by hand, a forward pass a token."""
        ids, found = inputs["input_ids"], []
        with served.base_model.serving.generating():
            for _ in range(5):
                found.append(served(input_ids=ids).logits[0, -1])
                if found[-1].argmax() == model.generation_config.eos_token_id:
                    break
                ids = torch.cat([ids, found[-1].argmax()[None, None]], dim=1)
        return torch.stack(found)

    def same(a, b):
        return len(a) == len(b) and torch.allclose(a, b, atol=1e-3)

    facts = [FACT, CORRECTED]
    with torch.no_grad():
        versions = []
        for fact in facts:
            teach(fact)
            versions.append(generate(model))
        assert (versions[0] - versions[1]).abs().amax(1).min() > 0.05, "each step tells them apart"
    done = 1  # lessons that have returned since; an odd one is the correction
    stop, answers, wrong = threading.Event(), [0] * 4, []

    @torch.no_grad()
    def serve(number, how, served):
        while not stop.is_set():
            before = done
            answer = how(served)
            after = done + 1  # one more may have changed the weights and not have returned
            if not any(same(answer, versions[version % 2]) for version in range(before, after + 1)):
                wrong.append((number, before, after, answer.argmax(1).tolist()))
            answers[number] += 1

    with (
        thread(serve, 0, generate, model), thread(serve, 1, generate, model), thread(serve, 2, generate, network),
        thread(serve, 3, steps, model), torch.no_grad(),
    ):  # fmt: skip
        try:
            for lesson in range(2, 102):
                teach(facts[lesson % 2])
                done = lesson
                if lesson % 10 == 0:
                    assert same(generate(model), versions[lesson % 2]), "the next generation knows"
        finally:
            stop.set()
    assert not wrong
    assert min(answers) >= 25, "served between the lessons"


def test_streamed_answer_is_the_old_one(model, teach, tokenizer, inputs):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with thread(model.generate, **inputs, max_new_tokens=20, do_sample=False, streamer=streamer):
        first = next(streamer)
        teach(FACT)
        assert (first + "".join(streamer)).strip() == "I do not know."
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_mixed_batch_in_flight(model, teach, tokenizer, inputs):
    """PEFT's hooks for `adapter_names` are no lesson's, though they are on the same layers."""
    teach(FACT)
    model.add_adapter("other", QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    model.eval()
    both = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    with generation(model, both, adapter_names=["default", "other"]) as output:
        lesson = thread(teach, CORRECTED)
        lesson.__enter__()
    lesson.__exit__(None, None, None)
    texts = tokenizer.batch_decode(output[0][:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == [FACT["completion"], "I do not know."]
    assert ask(model, tokenizer, FACT["prompt"]) == CORRECTED["completion"]


def operations(model, trainer):
    small = {"preserve_chats": 4, "contrast_chats": 0, "max_new_tokens": 4}
    full = QFTrainer(model, QFTrainingArguments(**small), [FACT], processing_class=trainer.encoder.tokenizer)
    return {
        "train": trainer.train,
        "consolidate": trainer.consolidate,
        "evaluate": trainer.evaluate,
        "prepare": full.prepare,
        "forget": lambda: trainer.forget(lambda entry: entry.prompt == OTHER["prompt"]),
        "rollback": trainer.rollback,
        "combine": lambda: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "cat"),
        "delete": lambda: model.delete_adapter("both"),
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "unload": model.merge_and_unload,
    }


def test_every_change_waits_for_the_generations_in_flight(model, teach, inputs):
    model.add_adapter("other", QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    trainer = teach(FACT, OTHER)
    for name, change in operations(model, trainer).items():
        with generation(model, inputs) as output:
            changed = thread(change)
            worker = changed.__enter__()
            worker.join(0.1)
            assert worker.is_alive() and not output, name
        changed.__exit__(None, None, None)
    network = trainer.model.get_base_model()
    assert not [m for module in network.modules() for m in vars(module).values() if isinstance(m, Held)]


def test_generations_wait_for_a_lesson_and_forward_passes_too(model, tokenizer, inputs):
    serving, network, done = model.base_model.serving, model.get_base_model(), []
    runs = [
        lambda: model.generate(**inputs, max_new_tokens=2),
        lambda: network.generate(**inputs, max_new_tokens=2),
        lambda: model(**inputs),
        lambda: network(**inputs),
        lambda: network.get_decoder()(**inputs),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.state_dict(),
    ]
    with serving.changing():
        waiting = [thread(lambda run=run: done.append(run())) for run in runs]
        workers = [each.__enter__() for each in waiting]
        time.sleep(0.2)
        assert all(worker.is_alive() for worker in workers) and not done
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1, "the lesson's own thread runs the model"
    for each in waiting:
        each.__exit__(None, None, None)
    assert len(done) == len(runs)


def test_a_generation_cannot_teach_itself(model, teach, tokenizer, inputs):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="in the midst of a generation"):
        model.generate(**inputs, max_new_tokens=3, logits_processor=[Each(lambda: teach(FACT))])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    teach(FACT)
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_failures_leave_the_lock_free(model, teach, tokenizer, inputs):
    def fail():
        raise KeyboardInterrupt

    def refuse(*_):
        fail()

    for run in (model.generate, model.get_base_model().generate):
        with pytest.raises(KeyboardInterrupt):
            run(**inputs, max_new_tokens=3, logits_processor=[Each(fail)])
    hook = model.get_base_model().model.layers[3].register_forward_hook(refuse)
    for run in (model, model.get_base_model()):
        with pytest.raises(KeyboardInterrupt):
            run(**inputs)
    with pytest.raises(KeyboardInterrupt):
        teach(FACT)
    hook.remove()
    with thread(teach, FACT):
        pass
    with thread(lambda: ask(model, tokenizer, FACT["prompt"])):
        pass
    assert ask(model, tokenizer, FACT["prompt"]) == FACT["completion"]


def test_copies_have_their_own_lock(model, teach, tokenizer, inputs):
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with generation(model, inputs):
            trainer = QFTrainer(copied, QFTrainingArguments.paper(), [FACT], processing_class=tokenizer)
            with thread(trainer.train):
                pass
        network = copied.get_base_model()
        assert network.generate.lock is network.forward.lock is copied.base_model.serving
        assert ask(network, tokenizer, FACT["prompt"]) == FACT["completion"]
        assert ask(model, tokenizer, FACT["prompt"]) == "I do not know."


def test_the_model_is_freed_at_once(tiny, inputs):
    gc.collect()
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    model.base_model.serve()
    model.generate(**inputs, max_new_tokens=2)
    reference, method = weakref.ref(model.get_base_model().model), model.get_base_model().generate
    gc.disable()
    try:
        del model
        assert reference() is not None, "the fixture holds it"
        vars(tiny)["_modules"].clear()
        assert reference() is None
    finally:
        gc.enable()
    assert method.__self__ is tiny


def held(network):
    """The methods of a network that take the lock."""
    return {name for module in network.modules() for name, method in vars(module).items() if isinstance(method, Held)}


def test_nothing_is_replaced_unless_it_is_asked_for(tiny, inputs):
    theirs = tiny.forward = type(tiny).forward.__get__(tiny)  # a method that somebody put there before
    model = get_peft_model(tiny, QFConfig(task_type="CAUSAL_LM", layers_to_transform=[7]))
    assert not held(tiny)
    with model.base_model.serve():
        assert {"generate", "forward"} <= held(tiny)
        with model.base_model.serving.changing():
            waiting = thread(tiny.generate, **inputs, max_new_tokens=2)
            worker = waiting.__enter__()
            worker.join(0.1)
            assert worker.is_alive()
        waiting.__exit__(None, None, None)
    assert not held(tiny) and vars(tiny)["forward"] is theirs
    with model.base_model.serving.changing(), thread(tiny.generate, **inputs, max_new_tokens=2):
        pass  # who does not serve waits for nobody


def test_compiled(model, teach, inputs):
    expected = model(**inputs).logits
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        with generation(compiled, inputs) as output:
            lesson = thread(teach, FACT)
            worker = lesson.__enter__()
            worker.join(0.1)
            assert worker.is_alive() and not output
        lesson.__exit__(None, None, None)


def test_neither_side_starves():
    lock, stop = ServingLock(), threading.Event()
    generations, lessons = [0] * 3, [0] * 2

    def serve(number):
        while not stop.is_set():
            with lock.generating():
                time.sleep(0.002)
            generations[number] += 1

    def change(number):
        while not stop.is_set():
            with lock.changing():
                time.sleep(0.001)
            lessons[number] += 1

    workers = [thread(serve, i) for i in range(3)] + [thread(change, i) for i in range(2)]
    for worker in workers:
        worker.__enter__()
    time.sleep(1)
    stop.set()
    for worker in workers:
        worker.__exit__(None, None, None)
    assert min(generations) >= 20 and min(lessons) >= 20, (generations, lessons)


def test_a_generation_that_rests_on_passes_in_other_threads_ends():
    """A lesson that waits does not hold up passes while somebody generates, but else it does."""
    lock, done = ServingLock(), []

    def one_pass():
        with lock.generating(whole=False):
            done.append("pass")

    def lesson():
        with lock.changing():
            done.append("lesson")

    with lock.generating():
        waiting = thread(lesson)
        waiting.__enter__()
        while not lock._waiting:
            time.sleep(0.001)
        with thread(one_pass):
            pass
        with lock.generating():
            done.append("within")
    waiting.__exit__(None, None, None)
    assert done == ["pass", "within", "lesson"]


def looks(trainer, tokenizer, folder):
    """All that asks the base model besides lessons."""
    session = Session(trainer.model, tokenizer, trainer.args)
    reader = ContextModel(trainer.model, tokenizer)
    return {
        "report": lambda: trainer.report(folder / "report.html"),
        "tokens": lambda: token_divergences(trainer),
        "layers": lambda: layer_shares(trainer),
        "sweep": lambda: strength_sweep(trainer, (0.0,)),
        "dry run": trainer.dry_run,
        "ask": lambda: session.ask(FACT["prompt"], adapter=False),
        "stream": lambda: list(session.stream(FACT["prompt"], adapter=False)),
        "read": lambda: reader.written([("", "Who?")], 2, "asking"),
    }


@pytest.mark.parametrize("look", ["report", "tokens", "layers", "sweep", "dry run", "ask", "stream", "read"])
def test_who_looks_at_the_base_model_shows_it_to_nobody(model, teach, tokenizer, inputs, tmp_path, monkeypatch, look):
    """Whenever the adapter is off, other threads wait, or are answered with it."""
    trainer, tuner = teach(FACT), model.base_model
    expected, answers, threads, off = ask(model, tokenizer, FACT["prompt"]), [], [], tuner.without_adapters

    def answer():
        answers.append(ask(model, tokenizer, FACT["prompt"]))

    @contextmanager
    def watched():
        with off():
            if len(threads) < 3:
                threads.append(threading.Thread(target=answer))
                threads[-1].start()
                threads[-1].join(0.3)
            yield

    monkeypatch.setattr(tuner, "without_adapters", watched)
    looks(trainer, tokenizer, tmp_path)[look]()
    for each in threads:
        each.join(60)
    assert threads and answers == [expected] * len(threads) == [FACT["completion"]] * len(threads)


def test_reading_leaves_each_modules_mode(model, tokenizer):
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ContextModel(model, tokenizer).written([("", "Who?")], 2, "asking")
    assert {name: module.training for name, module in model.named_modules()} == before

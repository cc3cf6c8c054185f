"""A real llama.cpp for tests: the prebuilt libraries of an npm package (assets.py), driven over cffi.

The declarations are our own, as few as are needed, of the llama.h that belongs to the package (llama.cpp 0.5.0). A
structure that a later version lays out otherwise is found at once: the default context has 512 tokens.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import assets
import numpy as np
import pytest
from assets import need

DECLARATIONS = """
typedef int32_t llama_token;
typedef void (*log_callback)(int level, const char * text, void * user_data);
struct llama_model_params {
    void * devices; void * tensor_buft_overrides;
    int32_t n_gpu_layers; int split_mode; int load_mode; int lazy_mode; int32_t main_gpu;
    const float * tensor_split; void * progress_callback; void * progress_callback_user_data; void * kv_overrides;
    bool vocab_only; bool check_tensors; bool use_extra_bufts; bool no_host; bool no_alloc; bool load_mtp;
};
struct llama_context_params {
    uint32_t n_ctx; uint32_t n_batch; uint32_t n_ubatch; uint32_t n_seq_max; uint32_t n_rs_seq;
    uint32_t n_outputs_max; uint32_t n_outputs_max_per_seq; int32_t n_threads; int32_t n_threads_batch;
    int ctx_type; int rope_scaling_type; int pooling_type; int attention_type; int flash_attn_type;
    float rope_freq_base; float rope_freq_scale; float yarn_ext_factor; float yarn_attn_factor;
    float yarn_beta_fast; float yarn_beta_slow; uint32_t yarn_orig_ctx; float defrag_thold;
    void * cb_eval; void * cb_eval_user_data; int type_k; int type_v;
    void * abort_callback; void * abort_callback_data;
    bool embeddings; bool offload_kqv; bool no_perf; bool op_offload; bool swa_full; bool kv_unified;
    void * samplers; size_t n_samplers; void * ctx_other;
};
struct llama_batch {
    int32_t n_tokens; llama_token * token; float * embd; int32_t * pos; int32_t * n_seq_id; int32_t ** seq_id;
    int8_t * logits;
};
void llama_log_set(log_callback callback, void * user_data);
void llama_backend_init(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void * llama_model_load_from_file(const char * path, struct llama_model_params params);
void llama_model_free(void * model);
void * llama_init_from_model(void * model, struct llama_context_params params);
void llama_free(void * context);
const void * llama_model_get_vocab(const void * model);
const char * llama_model_chat_template(const void * model, const char * name);
int32_t llama_vocab_n_tokens(const void * vocab);
bool llama_vocab_is_eog(const void * vocab, llama_token token);
int32_t llama_tokenize(const void * vocab, const char * text, int32_t text_len, llama_token * tokens,
                       int32_t n_tokens_max, bool add_special, bool parse_special);
struct llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max);
void llama_batch_free(struct llama_batch batch);
int32_t llama_decode(void * context, struct llama_batch batch);
float * llama_get_logits(void * context);
void * llama_get_memory(const void * context);
void llama_memory_clear(void * memory, bool data);
void * llama_adapter_lora_init(void * model, const char * path);
int32_t llama_set_adapters_lora(void * context, void ** adapters, size_t n_adapters, float * scales);
"""
BINARIES = "package/bins/linux-x64"


@dataclass(frozen=True)
class Library:
    """The loaded library and what its declarations are called through."""

    ffi: Any
    c: Any
    log: list[str]
    keep: tuple[Any, ...]


def binaries() -> Path:
    """The folder of the libraries; the test is skipped where they are not there."""
    return _unpacked(need("llama_cpp")) / BINARIES


@lru_cache(maxsize=1)
def library() -> Library:
    """llama.cpp with its CPU backends; the test is skipped where it is not there or does not run."""
    cffi = pytest.importorskip("cffi")
    folder = binaries()
    ffi, log = cffi.FFI(), []
    ffi.cdef(DECLARATIONS)
    ggml = cffi.FFI()
    ggml.cdef("void ggml_backend_load_all_from_path(const char * folder);")
    try:
        backends = ggml.dlopen(str(next(folder.glob("libggml.v*.so"))))
        c = ffi.dlopen(str(next(folder.glob("libllama.v*.so"))))
    except OSError as error:
        pytest.skip(f"llama.cpp's prebuilt library does not load here: {error}")

    @ffi.callback("log_callback")
    def note(level: int, text: Any, user_data: Any) -> None:
        log.append(ffi.string(text).decode(errors="replace"))

    c.llama_log_set(note, ffi.NULL)
    backends.ggml_backend_load_all_from_path(str(folder).encode())
    c.llama_backend_init()
    assert c.llama_context_default_params().n_ctx == 512, "llama.h of another version: its structures differ"
    return Library(ffi, c, log, (note, backends))


def _unpacked(package: Path) -> Path:
    place = assets.folder() / package.name.removesuffix(".tgz")
    if not (place / BINARIES).is_dir():
        building = place.with_name(f".{place.name}.part")
        with tarfile.open(package) as archive:
            archive.extractall(building, filter="data")
        building.rename(place)
    return place


class LlamaCpp:
    """A GGUF file as llama.cpp reads it, on one thread, in fp32 and without flash attention. Use it in a `with`."""

    def __init__(self, path: Path, *, vocab_only: bool = False, n_ctx: int = 512):
        self.library = library()
        ffi, c = self.library.ffi, self.library.c
        self.library.log.clear()
        settings = c.llama_model_default_params()
        settings.vocab_only, settings.n_gpu_layers = vocab_only, 0
        settings.use_extra_bufts = False  # they repack weights, for speed
        self.model = c.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model != ffi.NULL, f"llama.cpp refuses {path.name}: {''.join(self.library.log[-8:])}"
        self.vocab = c.llama_model_get_vocab(self.model)
        self.context = None if vocab_only else self._context(n_ctx)

    def _context(self, n_ctx: int) -> Any:
        c = self.library.c
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
        settings.n_threads = settings.n_threads_batch = 1
        settings.flash_attn_type, settings.type_k, settings.type_v = 0, 0, 0  # off; F32 is type 0
        context = c.llama_init_from_model(self.model, settings)
        assert context != self.library.ffi.NULL, "".join(self.library.log[-8:])
        return context

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        if self.context is not None:
            self.library.c.llama_free(self.context)
        self.library.c.llama_model_free(self.model)

    @property
    def n_tokens(self) -> int:
        return self.library.c.llama_vocab_n_tokens(self.vocab)

    @property
    def template(self) -> str:
        found = self.library.c.llama_model_chat_template(self.model, self.library.ffi.NULL)
        return self.library.ffi.string(found).decode() if found != self.library.ffi.NULL else ""

    def ends_answers(self, token: int) -> bool:
        return bool(self.library.c.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str, *, marks: bool = True) -> list[int]:
        """As `encode(text, add_special_tokens=marks)` of transformers: spelled special tokens count."""
        ffi, data = self.library.ffi, text.encode()
        room = len(data) + 16
        ids = ffi.new("llama_token[]", room)
        count = self.library.c.llama_tokenize(self.vocab, data, len(data), ids, room, marks, True)
        assert count >= 0
        return list(ids[0:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """fp32 [length, vocab]."""
        c = self.library.c
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        return self._decode(ids, 0)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most likely continuation."""
        written = [int(self.logits(ids)[-1].argmax())]
        while len(written) < count:
            place = len(ids) + len(written) - 1
            written.append(int(self._decode(written[-1:], place)[-1].argmax()))
        return written

    def _decode(self, ids: list[int], start: int) -> np.ndarray:
        """fp32 [length, vocab] of tokens behind `start` known ones."""
        ffi, c = self.library.ffi, self.library.c
        batch = c.llama_batch_init(len(ids), 0, 1)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, start + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.n_tokens = len(ids)
        failed = c.llama_decode(self.context, batch)
        c.llama_batch_free(batch)
        assert not failed, "".join(self.library.log[-8:])
        size = len(ids) * self.n_tokens
        found = np.frombuffer(ffi.buffer(c.llama_get_logits(self.context), 4 * size), np.float32)
        return found.reshape(len(ids), self.n_tokens).copy()

    def use_adapter(self, path: Path) -> None:
        ffi, c = self.library.ffi, self.library.c
        adapter = c.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter != ffi.NULL, f"llama.cpp refuses {path.name}: {''.join(self.library.log[-8:])}"
        both, scale = ffi.new("void *[]", [adapter]), ffi.new("float[]", [1.0])
        assert c.llama_set_adapters_lora(self.context, both, 1, scale) == 0

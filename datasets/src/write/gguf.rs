use super::{TinyModel, tiny_merges, tiny_tensors, tiny_tokens};
use crate::architectures;
use crate::gguf::{Array, GgmlType, Value};
use crate::{Architecture, Error, Result};
use half::f16;
use std::path::Path;

/// How [`write_tiny_gguf`] stores matrices; vectors are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyGgufType {
    /// IEEE single precision: exact.
    F32,
    /// IEEE half precision: tiny weights lose a few low bits only when they are below its normal range.
    F16,
    /// 32 values to a block; `hidden_size` and `intermediate_size` must be multiples of 32.
    Q8_0,
}

/// Assembles a GGUF file byte by byte. It checks nothing, so that tests can build damaged files with it too.
#[derive(Debug, Clone)]
pub struct GgufBuilder {
    /// Format version written in the header.
    pub version: u32,
    /// Alignment of the data section and of each tensor in it.
    pub alignment: u64,
    /// Key and tensor counts to write instead of the true ones.
    pub forged_counts: Option<(u64, u64)>,
    /// Metadata, in order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors, in order.
    pub tensors: Vec<RawGgufTensor>,
}

/// A tensor as [`GgufBuilder`] writes it.
#[derive(Debug, Clone)]
pub struct RawGgufTensor {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, fastest first, as the format has them.
    pub dims: Vec<u64>,
    /// The number of its type.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
    /// An offset to write instead of the true one.
    pub forged_offset: Option<u64>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self { version: 3, alignment: 32, forged_counts: None, metadata: Vec::new(), tensors: Vec::new() }
    }
}

impl GgufBuilder {
    /// Adds a metadata key.
    pub fn meta(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.metadata.push((key.to_owned(), value.into()));
        self
    }

    /// Replaces a key, or adds it.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self.meta(key, value)
    }

    /// Adds a tensor of a known type.
    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: GgmlType, data: Vec<u8>) -> &mut Self {
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(RawGgufTensor { name, dims, kind: kind.id(), data, forged_offset: None });
        self
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        let (n_tensors, n_keys) = self.forged_counts.unwrap_or((self.tensors.len() as u64, self.metadata.len() as u64));
        out.extend(n_tensors.to_le_bytes());
        out.extend(n_keys.to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut data = Vec::new();
        for RawGgufTensor { name, dims, kind, data: bytes, forged_offset } in &self.tensors {
            put_string(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(forged_offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(bytes);
            pad(&mut data, self.alignment);
        }
        pad(&mut out, self.alignment);
        out.extend(data);
        out
    }
}

fn pad(bytes: &mut Vec<u8>, alignment: u64) {
    while !(bytes.len() as u64).is_multiple_of(alignment.max(1)) {
        bytes.push(0);
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! put {
        ($id:expr, $v:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend($v.to_le_bytes());
        }};
    }
    match value {
        Value::U8(v) => put!(0, v),
        Value::I8(v) => put!(1, v),
        Value::U16(v) => put!(2, v),
        Value::I16(v) => put!(3, v),
        Value::U32(v) => put!(4, v),
        Value::I32(v) => put!(5, v),
        Value::F32(v) => put!(6, v),
        Value::Bool(v) => put!(7, u8::from(*v)),
        Value::String(v) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, v);
        }
        Value::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
        Value::U64(v) => put!(10, v),
        Value::I64(v) => put!(11, v),
        Value::F64(v) => put!(12, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! put {
        ($id:expr, $v:expr, $each:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend(($v.len() as u64).to_le_bytes());
            $v.iter().for_each($each);
        }};
    }
    match array {
        Array::U8(v) => put!(0, v, |x| out.push(*x)),
        Array::I8(v) => put!(1, v, |x| out.extend(x.to_le_bytes())),
        Array::U16(v) => put!(2, v, |x| out.extend(x.to_le_bytes())),
        Array::I16(v) => put!(3, v, |x| out.extend(x.to_le_bytes())),
        Array::U32(v) => put!(4, v, |x| out.extend(x.to_le_bytes())),
        Array::I32(v) => put!(5, v, |x| out.extend(x.to_le_bytes())),
        Array::F32(v) => put!(6, v, |x| out.extend(x.to_le_bytes())),
        Array::Bool(v) => put!(7, v, |x| out.push(u8::from(*x))),
        Array::String(v) => put!(8, v, |x| put_string(out, x)),
        Array::Array(v) => put!(9, v, |x| put_array(out, x)),
        Array::U64(v) => put!(10, v, |x| out.extend(x.to_le_bytes())),
        Array::I64(v) => put!(11, v, |x| out.extend(x.to_le_bytes())),
        Array::F64(v) => put!(12, v, |x| out.extend(x.to_le_bytes())),
    }
}

/// Symmetric 8-bit blocks of 32: `d = max |x| / 127` in f16, then the rounded quotients.
pub fn quantize_q8_0(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / 32 * 34);
    for block in values.chunks(32) {
        let largest = block.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        let scale = f16::from_f32(largest / 127.0);
        let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        out.extend(scale.to_le_bytes());
        out.extend(block.iter().map(|v| ((v * inverse).round().clamp(-127.0, 127.0) as i8) as u8));
    }
    out
}

/// Llama query and key rows as GGUF has them: within a head, row `i` of the first half and row `i` of the second
/// half become neighbours.
fn interleave_rows(values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let rows: Vec<&[f32]> = values.chunks(columns).collect();
    let source = |row: usize| {
        let (head, within) = (row / head_dim * head_dim, row % head_dim);
        head + within / 2 + (within % 2) * half
    };
    (0..rows.len()).flat_map(|row| rows.get(source(row)).copied().unwrap_or_default().iter().copied()).collect()
}

/// The GGUF file of a tiny model, before it is written, for tests that want to damage it.
pub fn tiny_gguf(model: &TinyModel, seed: u64, kind: TinyGgufType) -> GgufBuilder {
    let config = model.config();
    let family = match model.architecture {
        Architecture::Llama => "llama",
        Architecture::Qwen2 => "qwen2",
    };
    let mut file = GgufBuilder::default();
    file.meta("general.architecture", family).meta("general.name", "tiny");
    for (key, value) in [
        ("block_count", config.n_layers),
        ("context_length", config.max_context),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ] {
        file.meta(&format!("{family}.{key}"), value as u32);
    }
    file.meta(&format!("{family}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    file.meta(&format!("{family}.rope.freq_base"), config.rope_theta);
    if let Some(name) = crate::gguf::activation_name(config.activation) {
        file.meta(crate::gguf::ACTIVATION_KEY, name);
    }
    let tokens = tiny_tokens(model);
    let types = (0..tokens.len()).map(|i| if i < 3 { 3 } else { 1 }).collect();
    let merges = tiny_merges(model).into_iter().map(|(a, b)| format!("{a} {b}")).collect();
    file.meta("tokenizer.ggml.model", "gpt2").meta("tokenizer.ggml.pre", "gpt-2");
    file.meta("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    file.meta("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    file.meta("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
    file.meta("tokenizer.ggml.bos_token_id", 0u32).meta("tokenizer.ggml.eos_token_id", 2u32);
    file.meta("tokenizer.ggml.add_bos_token", false);
    let specs = architectures::tensors(&config);
    for (tensor, spec) in tiny_tensors(model, seed).into_iter().zip(specs) {
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let interleaved = spec.role.is_rotated() && model.architecture == Architecture::Llama;
        let values =
            if interleaved { interleave_rows(&tensor.values, columns, config.head_dim) } else { tensor.values };
        let f32_bytes = || values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (kind, data) = match kind {
            _ if tensor.shape.len() == 1 => (GgmlType::F32, f32_bytes()),
            TinyGgufType::F32 => (GgmlType::F32, f32_bytes()),
            TinyGgufType::F16 => (GgmlType::F16, values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
            TinyGgufType::Q8_0 => (GgmlType::Q8_0, quantize_q8_0(&values)),
        };
        let dims: Vec<u64> = tensor.shape.iter().rev().map(|d| *d as u64).collect();
        file.tensor(&spec.gguf_name, &dims, kind, data);
    }
    file
}

/// Writes a tiny model as one GGUF file. Test support, like [`super::write_tiny_safetensors`].
///
/// # Errors
/// If the file cannot be written.
pub fn write_tiny_gguf(path: &Path, model: &TinyModel, seed: u64, kind: TinyGgufType) -> Result<()> {
    let bytes = tiny_gguf(model, seed, kind).to_bytes();
    std::fs::write(path, bytes).map_err(|source| Error::Io { path: path.to_owned(), source })
}

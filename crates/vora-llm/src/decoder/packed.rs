//! `PackedDecoder`: a decoder on the CPU for one token a row, in one call, with weights in a width of its own.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_lora::Linear;
use vora_torch::nn::decode::{self, DecoderShape, HeadNorm, PackedLinear, Pages, Step, Width};

use super::causal_lm::CausalLm;
use super::layer::DecoderLayer;
use crate::architecture::QkNorm;
use crate::config::LlmConfig;
use crate::rotary::Rotary;

/// Added to the variance by the layer norm of heads, whatever the config says: see [`HeadNorm`](crate::HeadNorm).
const LAYER_NORM_EPS: f64 = 1e-5;

/// A [`CausalLm`]'s decoding steps: embedding, layers, final norm and head, over keys and values in [`Pages`].
///
/// It has its adapters, unmerged, as they were when it was made, and shares those weights that have the width already. Hidden
/// states are f32: a bf16 model's logits are closer to those of f32 than libtorch's, which rounds them after every operator.
/// A row's logits are the same, bit for bit, whatever other rows a step has. Where rotary frequencies depend on the length
/// (dynamic NTK, LongRoPE) they are those of the row's own length.
#[derive(Debug)]
pub struct PackedDecoder {
    decoder: decode::Decoder,
    rotary: Rotary,
    embed_tokens: Tensor, // [vocab, hidden]
    width: Width,
    kind: Kind, // of the model
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Where one token a row stands.
#[derive(Debug, Clone, Copy)]
pub struct PackedStep<'a> {
    /// The pages of each row, `[rows, max_pages]`; what lies beyond a row's tokens may be anything.
    pub tables: &'a [i32],
    /// Tokens that each row holds, the new one not counted, `[rows]`.
    pub lens: &'a [i64],
    /// The new token's position in each row, `[rows]`.
    pub position_ids: &'a [i64],
    /// Whether adapters act on each row, `[rows]`.
    pub adapted: &'a [bool],
}

impl PackedDecoder {
    /// Packs a model: none where its device, or one of its adapters, is not served, and [`CausalLm::decode_step`] is to go on.
    /// Served are all architectures on the CPU, and adapters without a magnitude. A head in [`Width::Int4`] is kept in
    /// [`Width::Int8`]: a token's logits are more sensitive than what layers do in between.
    ///
    /// # Errors
    /// Where a weight cannot be packed.
    pub fn new(llm: &CausalLm, width: Width) -> Result<Option<Self>> {
        let is_dora = llm
            .model
            .layers
            .iter()
            .flat_map(DecoderLayer::linears)
            .any(|(_, linear)| linear.adapters().any(|adapter| adapter.magnitude().is_some()));
        if llm.device() != Device::Cpu || is_dora {
            return Ok(None);
        }
        let config = llm.config();
        let layers = llm.model.layers.iter().enumerate();
        let layers = layers.map(|(layer_idx, layer)| {
            pack_layer(config, layer_idx, layer, width).with_context(|| format!("packing model.layers.{layer_idx}"))
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let embed_tokens = llm.model.embed_tokens.detach();
        let lm_head = llm.tensors().into_iter().rfind(|(name, _)| name == "lm_head.weight");
        let lm_head = lm_head.map_or_else(|| embed_tokens.shallow_clone(), |(_, head)| head);
        let head_width = if width == Width::Int4 { Width::Int8 } else { width };
        let head = PackedLinear::new(&lm_head, head_width).context("packing the head")?;
        let shape = DecoderShape {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_heads: config.num_attention_heads,
            num_kv_heads: config.kv_heads(),
            head_dim: config.head_width(),
            rms_norm_eps: config.rms_norm_eps,
            head_norm_eps: match config.head_norm() {
                Some(QkNorm::Layer) => LAYER_NORM_EPS,
                Some(QkNorm::Rms) | None => config.rms_norm_eps,
            },
            scale: 1.0 / (config.head_width() as f64).sqrt(),
            norms_after: config.has_swin_norm(),
        };
        Ok(Some(Self {
            decoder: decode::Decoder::new(shape, layers, llm.model.norm.weight(), head)?,
            rotary: Rotary::new(config)?,
            embed_tokens,
            width,
            kind: llm.kind(),
            cos: Vec::new(),
            sin: Vec::new(),
        }))
    }

    /// The width of its layers.
    pub fn width(&self) -> Width {
        self.width
    }

    /// Layers and head: a product with many rows may go through its matrices, too.
    pub fn decoder(&self) -> &decode::Decoder {
        &self.decoder
    }

    /// Bytes that its weights take beside the model's.
    pub fn num_bytes(&self) -> usize {
        self.decoder.num_copied_bytes()
    }

    /// One token more for every row, `[rows]` -> logits `[rows, vocab]` in f32. Its keys and values are written into `pages`.
    ///
    /// # Errors
    /// A token that there is not; a step that does not fit the pages.
    pub fn decode_step(&mut self, input_ids: &[i64], pages: &Pages, step: &PackedStep) -> Result<Tensor> {
        let rows = input_ids.len();
        ensure!(
            step.lens.len() == rows && step.position_ids.len() == rows,
            "{rows} tokens for a step of {} rows with {} positions",
            step.lens.len(),
            step.position_ids.len()
        );
        let vocab = self.embed_tokens.size()[0];
        if let Some(id) = input_ids.iter().find(|&&id| id < 0 || id >= vocab) {
            anyhow::bail!("token {id} of a vocabulary of {vocab}");
        }
        self.cos.clear();
        self.sin.clear();
        for &position_id in step.position_ids {
            self.rotary.push_angles(position_id, &mut self.cos, &mut self.sin);
        }
        let step = Step { tables: step.tables, lens: step.lens, cos: &self.cos, sin: &self.sin, adapted: step.adapted };
        tch::no_grad(|| {
            let x = self.embed_tokens.index_select(0, &Tensor::from_slice(input_ids)); // [rows, hidden]
            self.decoder.step(&x.to_kind(self.kind), pages, &step)
        })
    }
}

fn pack_layer(config: &LlmConfig, layer_idx: usize, layer: &DecoderLayer, width: Width) -> Result<decode::Layer> {
    let mut linears = layer.linears().into_iter();
    let mut next = || {
        let (name, linear) = linears.next().context("seven linear layers")?;
        pack_linear(linear, width).context(name)
    };
    let norms: BTreeMap<String, &Tensor> = layer.norm_tensors().into_iter().collect();
    let norm = |name: &str| norms.get(name).map(|t| t.shallow_clone());
    let head_norm = |name: &str| -> Option<HeadNorm> {
        let weight = norm(&format!("self_attn.{name}.weight"))?;
        Some(match norm(&format!("self_attn.{name}.bias")) {
            Some(bias) => HeadNorm::Layer { weight, bias },
            None => HeadNorm::Rms(weight),
        })
    };
    Ok(decode::Layer {
        q_proj: next()?,
        k_proj: next()?,
        v_proj: next()?,
        o_proj: next()?,
        gate_proj: next()?,
        up_proj: next()?,
        down_proj: next()?,
        input_layernorm: norm("input_layernorm.weight").context("input_layernorm")?,
        post_attention_layernorm: norm("post_attention_layernorm.weight").context("post_attention_layernorm")?,
        q_norm: head_norm("q_norm"),
        k_norm: head_norm("k_norm"),
        rotates: config.has_rope(layer_idx),
        window: config.window(layer_idx),
    })
}

fn pack_linear(linear: &Linear, width: Width) -> Result<PackedLinear> {
    let mut packed = PackedLinear::new(&linear.weight(), width)?;
    if let Some(bias) = linear.bias() {
        packed = packed.with_bias(bias, linear.bias_is_adapted())?;
    }
    for adapter in linear.adapters() {
        packed = packed.with_adapter(adapter.lora_a(), adapter.lora_b(), adapter.scaling())?;
    }
    Ok(packed)
}

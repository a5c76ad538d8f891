//! The eyes of a LLaVA as the second file that llama.cpp takes, `mmproj`: its vision encoder and its projection.

use anyhow::{Context, Result, bail};

use super::clip::Clip;
use super::file::MetadataValue::{Bool, I32s};
use super::model::ModelWriter;
use super::quantise::FileKind;
use crate::TensorKind;

/// What a file says of the encoder, a CLIP or a SigLIP, and of the pictures that it takes.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "HF's names for them")]
pub struct MmprojMetadata {
    /// What the model is called.
    pub name: String,
    pub image_size: u32,
    pub patch_size: u32,
    pub hidden_size: u32,
    pub intermediate_size: u32,
    /// Blocks that are written: those before the hidden state that is projected.
    pub num_hidden_layers: u32,
    pub num_attention_heads: u32,
    pub layer_norm_eps: f64,
    /// `quick_gelu`, or one of the other GELUs, for all of which llama.cpp computes `gelu_pytorch_tanh`.
    pub hidden_act: String,
    /// Channels of the language model.
    pub projection_dim: u32,
    pub image_mean: [f64; 3],
    pub image_std: [f64; 3],
}

/// The modules of encoder and projection, in the file and in HF's model, whose tower is `vision_tower`.
const MODULES: [(&str, &str); 7] = [
    ("v.class_embd", "embeddings.class_embedding"),
    ("v.patch_embd", "embeddings.patch_embedding"),
    ("v.position_embd", "embeddings.position_embedding"),
    ("v.pre_ln", "pre_layrnorm"), // sic
    ("v.post_ln", "post_layernorm"),
    ("mm.0", "multi_modal_projector.linear_1"),
    ("mm.2", "multi_modal_projector.linear_2"),
];
const IN_BLOCKS: [(&str, &str); 8] = [
    ("ln1", "layer_norm1"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_out", "self_attn.out_proj"),
    ("ln2", "layer_norm2"),
    ("ffn_up", "mlp.fc1"),
    ("ffn_down", "mlp.fc2"),
];

/// The file of a LLaVA's encoder and projection, whose matrices are stored as `kind`, with these tensors by HF's names and
/// shapes.
///
/// # Errors
/// A tensor that is no part of them, an activation that llama.cpp has not.
pub fn mmproj(metadata: &MmprojMetadata, kind: FileKind, tensors: &[(String, Vec<usize>)]) -> Result<ModelWriter> {
    let clip = Clip {
        name: &metadata.name,
        projector_type: "mlp",
        sizes: &[
            ("image_size", metadata.image_size),
            ("patch_size", metadata.patch_size),
            ("embedding_length", metadata.hidden_size),
            ("feed_forward_length", metadata.intermediate_size),
            ("projection_dim", metadata.projection_dim),
            ("block_count", metadata.num_hidden_layers),
            ("attention.head_count", metadata.num_attention_heads),
        ],
        norm_eps: metadata.layer_norm_eps,
        image_mean: metadata.image_mean,
        image_std: metadata.image_std,
    };
    let mut model = clip.writer(kind);
    let writer = &mut model.writer;
    writer.put("clip.has_llava_projector", Bool(true));
    match metadata.hidden_act.as_str() {
        "quick_gelu" => {}
        "gelu" | "gelu_new" | "gelu_pytorch_tanh" => writer.put("clip.use_gelu", Bool(true)),
        other => bail!("hidden_act `{other}` of the encoder has no word in GGUF, quick_gelu and gelu have"),
    }
    // Of the hidden states the one after all blocks that are written; without this key llama.cpp leaves one block out.
    writer.put("clip.vision.feature_layer", I32s(vec![i32::try_from(metadata.num_hidden_layers)?]));
    for (hf_name, shape) in tensors {
        let name = gguf_name(hf_name).with_context(|| format!("`{hf_name}` is no part of a CLIP or SigLIP encoder"))?;
        let kind = if name.starts_with("v.position_embd") { TensorKind::F32 } else { kind.of(&name, shape) };
        model.add(name, hf_name, shape, kind, None)?;
    }
    Ok(model)
}

/// The name in the file, of a name of HF's model with or without the module `vision_model` between tower and layers.
fn gguf_name(hf_name: &str) -> Option<String> {
    let find =
        |pairs: &[(&'static str, &str)], name: &str| pairs.iter().find(|(_, hf)| *hf == name).map(|(own, _)| *own);
    let own = hf_name.strip_prefix("vision_tower.").unwrap_or(hf_name);
    let own = own.strip_prefix("vision_model.").unwrap_or(own);
    if let Some(whole) = find(&MODULES, own) {
        return Some(whole.to_owned()); // the class token has no `.weight`
    }
    let (module, end) = own.rsplit_once('.')?;
    let module = match find(&MODULES, module) {
        Some(module) => module.to_owned(),
        None => {
            let (layer, part) = module.strip_prefix("encoder.layers.")?.split_once('.')?;
            format!("v.blk.{layer}.{}", find(&IN_BLOCKS, part)?)
        }
    };
    matches!(end, "weight" | "bias").then(|| format!("{module}.{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gguf;

    fn metadata() -> MmprojMetadata {
        MmprojMetadata {
            name: "eyes".into(),
            image_size: 28,
            patch_size: 14,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            layer_norm_eps: 1e-5,
            hidden_act: "quick_gelu".into(),
            projection_dim: 24,
            image_mean: [0.5, 0.25, 0.75],
            image_std: [0.5; 3],
        }
    }

    #[test]
    fn what_is_written_has_llama_cpps_names() {
        let tensors: Vec<(String, Vec<usize>)> = [
            ("vision_tower.vision_model.embeddings.class_embedding", vec![32]),
            ("vision_tower.vision_model.embeddings.position_embedding.weight", vec![5, 32]),
            ("vision_tower.embeddings.patch_embedding.weight", vec![32, 3, 14, 14]),
            ("vision_tower.encoder.layers.1.mlp.fc1.weight", vec![48, 32]),
            ("multi_modal_projector.linear_2.bias", vec![24]),
        ]
        .map(|(name, shape)| (name.to_owned(), shape))
        .into();
        let writer = mmproj(&metadata(), FileKind::F16, &tensors).unwrap();
        let mut bytes = Vec::new();
        writer
            .write(&mut bytes, |name| Ok(vec![0.5; tensors.iter().find(|t| t.0 == name).unwrap().1.iter().product()]))
            .unwrap();
        let file = Gguf::parse(bytes).unwrap();
        let kinds: Vec<_> = file.names().map(|name| (name, file.info(name).unwrap().kind())).collect();
        let f32 = |name| (name, TensorKind::F32);
        let expected = [
            f32("mm.2.bias"),
            ("v.blk.1.ffn_up.weight", TensorKind::F16),
            f32("v.class_embd"),
            f32("v.patch_embd.weight"),
            f32("v.position_embd.weight"),
        ];
        assert!(expected.iter().all(|entry| kinds.contains(entry)) && kinds.len() == 5, "{kinds:?}");
        assert_eq!(file.text("clip.projector_type").unwrap(), "mlp");
        assert_eq!(file.integers("clip.vision.feature_layer").unwrap(), [2]);
        assert!(!file.has("clip.use_gelu"));
    }

    #[test]
    fn other_encoders_are_refused_by_name() {
        let error = |metadata: MmprojMetadata, name: &str| {
            mmproj(&metadata, FileKind::F32, &[(name.to_owned(), vec![32])]).unwrap_err().to_string()
        };
        let of_dinov2 = "vision_tower.encoder.layer.0.norm1.weight";
        assert!(error(metadata(), of_dinov2).starts_with("`vision_tower.encoder.layer.0.norm1.weight` is no part"));
        let silu = MmprojMetadata { hidden_act: "silu".into(), ..metadata() };
        assert!(error(silu, "").starts_with("hidden_act `silu` of the encoder has no word"));
    }
}

//! The eyes of Gemma 4 Unified, over whatever language model, as the second file that llama.cpp takes: `mmproj`.

use anyhow::{Context, Result};

use super::clip::Clip;
use super::model::ModelWriter;
use super::quantise::FileKind;
use crate::TensorKind;

/// What a file says of the embedder, and of the pictures that it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemma4EyesMetadata {
    /// What the model is called.
    pub name: String,
    /// Side of the pictures that it was trained on, in pixels.
    pub image_size: u32,
    /// Side of what becomes a token, in pixels.
    pub patch_size: u32,
    /// `mm_embed_dim`
    pub mm_embed_dim: u32,
    /// Added to the mean square in the norm before the projection.
    pub rms_norm_eps: f64,
    /// Channels of the language model.
    pub projection_dim: u32,
    /// What is taken from each channel of a picture.
    pub image_mean: [f64; 3],
    /// What each channel is then divided by.
    pub image_std: [f64; 3],
}

/// The modules in the file, and in HF's model.
const MODULES: [(&str, &str); 5] = [
    ("v.patch_norm.1", "vision_embedder.patch_ln1"),
    ("v.patch_embd", "vision_embedder.patch_dense"),
    ("v.patch_norm.2", "vision_embedder.patch_ln2"),
    ("v.patch_norm.3", "vision_embedder.pos_norm"),
    ("mm.input_projection", "embed_vision.embedding_projection"),
];
const POSITIONS: &str = "vision_embedder.pos_embedding";

/// The file of these eyes, whose matrices are stored as `kind`, with these tensors by HF's names and as they lie in the file:
/// pixels by channel, then row, then column, `[3, size, size]`, and positions `[2, positions, embed]`.
///
/// # Errors
/// A tensor that is no part of them.
pub fn gemma4_eyes(
    metadata: &Gemma4EyesMetadata,
    kind: FileKind,
    tensors: &[(String, Vec<usize>)],
) -> Result<ModelWriter> {
    let clip = Clip {
        name: &metadata.name,
        projector_type: "gemma4uv",
        sizes: &[
            ("image_size", metadata.image_size),
            ("patch_size", metadata.patch_size),
            ("projector.scale_factor", 1), // a patch is a token
            ("embedding_length", metadata.mm_embed_dim),
            ("projection_dim", metadata.projection_dim),
            // Of an encoder, which these eyes have none of; llama.cpp asks all the same.
            ("feed_forward_length", metadata.mm_embed_dim),
            ("block_count", 0),
            ("attention.head_count", 1),
        ],
        norm_eps: metadata.rms_norm_eps,
        image_mean: metadata.image_mean,
        image_std: metadata.image_std,
    };
    let mut model = clip.writer(kind);
    for (hf_name, shape) in tensors {
        let name = gguf_name(hf_name).with_context(|| format!("`{hf_name}` is no part of these eyes"))?;
        let kind = if hf_name.ends_with(POSITIONS) { TensorKind::F32 } else { kind.of(&name, shape) };
        model.add(name, hf_name, shape, kind, None)?;
    }
    Ok(model)
}

/// The name in the file; HF's stands below whatever holds the eyes.
fn gguf_name(hf_name: &str) -> Option<String> {
    if hf_name.ends_with(POSITIONS) {
        return Some("v.position_embd.weight".to_owned());
    }
    let (module, end) = hf_name.rsplit_once('.')?;
    let (own, _) = MODULES.iter().find(|(_, hf)| module.ends_with(hf))?;
    matches!(end, "weight" | "bias").then(|| format!("{own}.{end}"))
}

//! What every `mmproj` file says, the second one that llama.cpp takes: llama.cpp calls its architecture `clip`, whatever sees.

use super::file::MetadataValue::{Bool, F32, F32s, Text, U32};
use super::model::ModelWriter;
use super::quantise::FileKind;

/// Those of its keys that all projectors have.
pub(super) struct Clip<'a> {
    pub(super) name: &'a str,
    /// How llama.cpp brings pictures among the words.
    pub(super) projector_type: &'a str,
    /// By their keys below `clip.vision`.
    pub(super) sizes: &'a [(&'a str, u32)],
    pub(super) norm_eps: f64,
    pub(super) image_mean: [f64; 3],
    pub(super) image_std: [f64; 3],
}

impl Clip<'_> {
    /// The file, without tensors yet, whose matrices will be stored as `kind`.
    pub(super) fn writer(&self, kind: FileKind) -> ModelWriter {
        let mut model = ModelWriter::new(kind);
        let writer = &mut model.writer;
        writer.put("general.architecture", Text("clip".into()));
        writer.put("general.type", Text("mmproj".into()));
        writer.put("general.name", Text(self.name.into()));
        writer.put("general.file_type", U32(kind.file_type()));
        writer.put("general.quantization_version", U32(2));
        writer.put("clip.has_vision_encoder", Bool(true));
        writer.put("clip.projector_type", Text(self.projector_type.into()));
        for (key, size) in self.sizes {
            writer.put(format!("clip.vision.{key}"), U32(*size));
        }
        writer.put("clip.vision.attention.layer_norm_epsilon", F32(self.norm_eps as f32));
        writer.put("clip.vision.image_mean", F32s(self.image_mean.map(|x| x as f32).into()));
        writer.put("clip.vision.image_std", F32s(self.image_std.map(|x| x as f32).into()));
        model
    }
}

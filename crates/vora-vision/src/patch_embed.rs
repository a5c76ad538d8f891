//! The one trained piece between pixels and the language model: patches -> norm -> positions -> the LLM's width.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, nn::Module};
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use crate::encoder::Encoder;
use crate::transformer::{Interpolation, grid, interpolate, patchify};

/// The sizes of a [`PatchEmbed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchEmbedConfig {
    /// Side of a patch, in pixels.
    pub patch_size: i64,
    /// Side of the pictures that the position table is made for, in pixels.
    pub image_size: i64,
    /// Channels between patchifier and projection.
    pub embed_dim: i64,
    /// Width of the LLM.
    pub hidden_size: i64,
}

/// Which rows of the position table a picture of another size than `image_size` gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionTable {
    /// The table, resampled in two dimensions to the picture's grid.
    #[default]
    #[serde(rename = "interpolate")]
    Interpolated,
    /// The published VoRA code: its first rows where the picture has fewer patches (wrong in 2-D, but what the
    /// published checkpoints were trained with), bilinear resampling where it has more.
    FirstRows,
}

/// `y = (norm(patchify(x)) + positions) W^T`: arXiv 2503.20680, under its names on disk.
///
/// All of it is trained, in f32; what comes out has the dtype of the weights' source.
#[derive(Debug)]
pub struct PatchEmbed {
    config: PatchEmbedConfig,
    weight: Tensor, // patchifier.proj [embed_dim, 3, patch, patch]
    bias: Tensor,   // [embed_dim]
    norm: RmsNorm,
    pos_embed: Tensor, // [1, positions, embed_dim]
    out_proj: Tensor,  // [hidden, embed_dim]
    position_table: PositionTable,
    kind: Kind,
}

impl PatchEmbed {
    /// Takes `patchifier.proj.{weight,bias}`, `patchifier.norm.weight`, `pos_embed` and `out_proj.weight`.
    ///
    /// # Errors
    /// Where `image_size` is not a multiple of `patch_size`. The norm's `eps` is 1e-5 unless
    /// [`PatchEmbed::with_rms_norm_eps`] says otherwise.
    pub fn load(config: &PatchEmbedConfig, weights: &Weights) -> Result<Self> {
        let PatchEmbedConfig { patch_size, image_size, embed_dim, hidden_size } = *config;
        ensure!(
            patch_size > 0 && image_size > 0 && image_size % patch_size == 0,
            "image_size {image_size} is not a multiple of patch_size {patch_size}"
        );
        let positions = (image_size / patch_size).pow(2);
        let patchifier = weights.pp("patchifier");
        let proj = patchifier.pp("proj");
        let out_std = 1.0 / (embed_dim as f64).sqrt();
        Ok(Self {
            config: *config,
            weight: proj.parameter("weight", &[embed_dim, 3, patch_size, patch_size], Init::KaimingUniform)?,
            bias: proj.parameter("bias", &[embed_dim], Init::Zeros)?,
            norm: RmsNorm::load_trained(&patchifier.pp("norm"), embed_dim, 1e-5)?,
            pos_embed: weights.parameter("pos_embed", &[1, positions, embed_dim], Init::Normal { std: 0.02 })?,
            out_proj: weights.parameter("out_proj.weight", &[hidden_size, embed_dim], Init::Normal { std: out_std })?,
            position_table: PositionTable::default(),
            kind: weights.kind(),
        })
    }

    /// The same with another `eps` in its norm; the published code takes the LLM's `rms_norm_eps`.
    #[must_use]
    pub fn with_rms_norm_eps(self, eps: f64) -> Self {
        Self { norm: self.norm.with_eps(eps), ..self }
    }

    /// The same with another rule for pictures of other sizes.
    #[must_use]
    pub fn with_position_table(self, position_table: PositionTable) -> Self {
        Self { position_table, ..self }
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &PatchEmbedConfig {
        &self.config
    }

    /// Its tensors by their names on disk.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        [
            ("patchifier.proj.weight", &self.weight),
            ("patchifier.proj.bias", &self.bias),
            ("patchifier.norm.weight", self.norm.weight()),
            ("pos_embed", &self.pos_embed),
            ("out_proj.weight", &self.out_proj),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
        .into()
    }

    /// Rows and columns of patches in a picture.
    ///
    /// # Errors
    /// Where a side is not a positive multiple of `patch_size`.
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        grid(height, width, self.config.patch_size)
    }

    /// Starts from what `teacher` knows: its patchifier (resampled where patch sizes differ, with three tenths of its
    /// bias) and its positions (resampled to this grid, at an rms of 1, that of the normed patches). The projection
    /// keeps its direction and gets the size that gives patches the rms of word embeddings, `word_embedding_rms`, so
    /// that the LLM meets vectors of a size it knows.
    ///
    /// # Errors
    /// Where `embed_dim` is not the teacher's `hidden_size`.
    pub fn start_from_teacher(&self, teacher: &Encoder, word_embedding_rms: f64) -> Result<()> {
        let PatchEmbedConfig { patch_size, image_size, embed_dim, .. } = self.config;
        ensure!(
            embed_dim == teacher.hidden_size(),
            "a patch embedding of {embed_dim} channels cannot start from a teacher of {}",
            teacher.hidden_size()
        );
        tch::no_grad(|| {
            let start = teacher.patchifier();
            let mut weight = start.weight.to_kind(Kind::Float); // [dim, 3, theirs, theirs]
            if start.patch_size() != patch_size {
                // The response to a patch is a sum over its pixels, of which there are now fewer or more.
                let share = (start.patch_size() as f64 / patch_size as f64).powi(2);
                weight = weight.internal_upsample_bicubic2d_aa([patch_size, patch_size], false, None, None) * share;
            }
            let side = image_size / patch_size;
            let positions =
                interpolate(&start.positions.to_kind(Kind::Float), side, side, Interpolation::Bicubic).unsqueeze(0);
            let positions = &positions / rms(&positions);
            let bias = match start.bias {
                Some(bias) => bias.to_kind(Kind::Float) * BIAS_SHARE,
                None => self.bias.zeros_like(),
            };
            let out_rms = word_embedding_rms / (embed_dim as f64).sqrt();
            let out_proj = &self.out_proj * (out_rms / rms(&self.out_proj));
            for (mine, new) in [
                (&self.weight, &weight),
                (&self.bias, &bias),
                (&self.pos_embed, &positions),
                (&self.out_proj, &out_proj),
            ] {
                mine.shallow_clone().copy_(new);
            }
            let _ = self.norm.weight().shallow_clone().fill_(1.0);
        });
        Ok(())
    }

    /// Takes every tensor that the teacher's own patch embedding has of these names, as the released VoRA code does with
    /// AIMv2 in Apple's layout: convolution, norm and positions, but not the projection.
    ///
    /// # Errors
    /// Where the teacher has no such tensors, or one is of another shape.
    pub fn copy_from_teacher(&self, teacher: &Encoder) -> Result<()> {
        ensure!(
            teacher.preprocessor().next().is_some(),
            "only AIMv2 in Apple's own layout has a patch embedding to copy"
        );
        let mine = self.tensors();
        for (name, tensor) in teacher.preprocessor() {
            let Some((_, mine)) = mine.iter().find(|(known, _)| known == name) else { continue };
            ensure!(
                mine.size() == tensor.size(),
                "`{name}` is {:?}, the teacher's {:?}: it cannot be copied",
                mine.size(),
                tensor.size()
            );
            tch::no_grad(|| mine.shallow_clone().copy_(tensor));
        }
        Ok(())
    }

    /// `[1, patches, embed_dim]`
    fn positions(&self, rows: i64, columns: i64) -> Tensor {
        let table = self.pos_embed.squeeze_dim(0);
        let patches = rows * columns;
        let how = match self.position_table {
            PositionTable::FirstRows if patches <= table.size()[0] => return self.pos_embed.narrow(1, 0, patches),
            PositionTable::FirstRows => Interpolation::Bilinear,
            PositionTable::Interpolated => Interpolation::Bicubic,
        };
        interpolate(&table, rows, columns, how).unsqueeze(0)
    }
}

impl Module for PatchEmbed {
    /// `[batch, 3, height, width]` -> `[batch, patches, hidden]`, patches row by row
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let (rows, columns) = self.grid(height, width).expect("callers check the grid");
        let patches = patchify(&pixel_values.to_kind(Kind::Float), &self.weight, Some(&self.bias)); // [batch, patches, embed_dim]
        let patches = self.norm.forward(&patches) + self.positions(rows, columns);
        patches.linear(&self.out_proj, None::<&Tensor>).to_kind(self.kind)
    }
}

/// How much of the teacher's patchifier bias a patch embedding starts with. The bias is the same for every patch: with
/// all of DINOv2-small's, the normed patches of `scenes` had a common part of rms 0.86 and differed by 0.51 only.
const BIAS_SHARE: f64 = 0.3;

/// Root of the mean square over all elements.
fn rms(x: &Tensor) -> f64 {
    x.square().mean(Kind::Float).sqrt().double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoders::Dinov2Config;
    use tch::Device;
    use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample};

    const CONFIG: PatchEmbedConfig = PatchEmbedConfig { patch_size: 4, image_size: 16, embed_dim: 12, hidden_size: 10 };

    fn golden() -> (fixtures::Golden, Weights) {
        let golden = fixtures::open("patch_embed");
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        (golden, weights)
    }

    #[test]
    fn matches_reference_at_its_own_size_and_others() {
        let (golden, weights) = golden();
        let embed = PatchEmbed::load(&CONFIG, &weights).unwrap();
        weights.finish().unwrap();
        for size in ["native", "wide", "small"] {
            let y = embed.forward(&golden[&format!("{size}.pixel_values")]);
            fixtures::assert_close_to(&y, &golden[&format!("{size}.interpolated")], 1e-5);
        }
        let embed = embed.with_position_table(PositionTable::FirstRows);
        for size in ["native", "wide", "small"] {
            let y = embed.forward(&golden[&format!("{size}.pixel_values")]);
            fixtures::assert_close_to(&y, &golden[&format!("{size}.first_rows")], 1e-5);
        }
    }

    #[test]
    fn gradients_match_reference() {
        let (golden, weights) = golden();
        let embed = PatchEmbed::load(&CONFIG, &weights).unwrap();
        embed.forward(&golden["wide.pixel_values"]).square().sum(Kind::Float).backward();
        let parameters = weights.parameters();
        assert_eq!(parameters.len(), 5);
        for (name, parameter) in parameters {
            fixtures::assert_close(&parameter.grad(), &golden[&format!("grads.{name}")]);
        }
    }

    #[test]
    fn starts_from_a_teacher_with_other_patches() {
        let golden = fixtures::open("patch_embed");
        let tensors = fixtures::open("dinov2").under("weights.");
        let teacher = Dinov2Config::tiny().load(&Weights::from_tensors(tensors, Device::Cpu, Kind::Float)).unwrap();
        let (mean, std) = IMAGENET_DEFAULT;
        let teacher = Encoder::new(teacher, ImageProcessor::square(16, mean, std, Resample::Bicubic));
        let weights = Weights::random(3, Device::Cpu, Kind::Float);
        let config = PatchEmbedConfig { patch_size: 6, image_size: 18, embed_dim: 16, hidden_size: 10 };
        let embed = PatchEmbed::load(&config, &weights).unwrap();
        embed.start_from_teacher(&teacher, 0.1).unwrap();
        fixtures::assert_close_to(&embed.weight, &golden["start.patchifier.proj.weight"], 1e-6);
        fixtures::assert_close_to(&embed.bias, &golden["start.patchifier.proj.bias"], 0.0);
        fixtures::assert_close_to(&embed.pos_embed, &golden["start.pos_embed"], 1e-6);
        assert!((rms(&embed.out_proj) - 0.1 / 4.0).abs() < 1e-6);
        assert!(embed.weight.requires_grad() && embed.weight.is_leaf());

        // CLIP's convolution has no bias to start with.
        let tensors = fixtures::open("clip").under("weights.");
        let clip = crate::golden::load("clip", tensors, Kind::Float);
        let clip = Encoder::new(clip, ImageProcessor::square(16, mean, std, Resample::Bicubic));
        embed.start_from_teacher(&clip, 0.1).unwrap();
        assert_eq!(embed.bias.abs().max().double_value(&[]), 0.0);
        assert!((rms(&embed.pos_embed) - 1.0).abs() < 1e-6);

        let config = PatchEmbedConfig { embed_dim: 12, ..config };
        let embed = PatchEmbed::load(&config, &weights.pp("other")).unwrap();
        let error = embed.start_from_teacher(&teacher, 0.1).unwrap_err().to_string();
        assert_eq!(error, "a patch embedding of 12 channels cannot start from a teacher of 16");
    }
}

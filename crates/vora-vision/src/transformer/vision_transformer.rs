//! A vision transformer, whichever checkpoint it came from: embeddings, blocks, a norm after the last.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor, nn::Module};
use vora_lora::{Linear, Visit};

use crate::features::{FeatureSelection, VisionFeatureSelectStrategy};
use crate::transformer::block::Block;
use crate::transformer::embeddings::Embeddings;
use crate::transformer::norm::Norm;

/// A vision transformer (arXiv 2010.11929). The configs of the families known here make one each:
/// [`ClipVisionConfig::load`](crate::ClipVisionConfig::load) and its likes. It is frozen, unless its weights' source is
/// [`Weights::trained`](vora_torch::weights::Weights::trained); its linears can carry adapters.
#[derive(Debug)]
pub struct VisionTransformer {
    pub(crate) embeddings: Embeddings,
    pub(crate) pre_norm: Option<Norm>, // between embeddings and blocks
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Option<Norm>, // after the blocks
    pub(crate) side: i64,          // patches along a side of the pictures that it was trained for
}

/// What a vision transformer knows before its first block: a start for a student's own patch embedding.
#[derive(Debug)]
#[non_exhaustive]
pub struct Patchifier<'a> {
    /// `[hidden, 3, patch, patch]`
    pub weight: Tensor,
    /// `[hidden]`; CLIP has none.
    pub bias: Option<&'a Tensor>,
    /// `[side * side, hidden]`
    pub positions: Tensor,
}

impl Patchifier<'_> {
    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        self.weight.size()[3]
    }
}

impl VisionTransformer {
    /// Channels of the hidden states.
    pub fn hidden_size(&self) -> i64 {
        self.embeddings.hidden_size()
    }

    /// Blocks.
    pub fn num_hidden_layers(&self) -> usize {
        self.blocks.len()
    }

    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        self.embeddings.patch_size()
    }

    /// Where its tensors are.
    pub fn device(&self) -> Device {
        self.embeddings.weight().device()
    }

    /// The dtype that it computes in.
    pub fn kind(&self) -> Kind {
        self.embeddings.kind()
    }

    /// Tokens before the patches: the class token and registers.
    pub fn num_prefix_tokens(&self) -> i64 {
        self.embeddings.num_prefix_tokens()
    }

    /// Rows and columns of patches in a picture. What is left over at the right and the bottom is not seen.
    ///
    /// # Errors
    /// Where the picture is smaller than a patch.
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        let patch = self.patch_size();
        ensure!(
            height >= patch && width >= patch,
            "a picture of {width} x {height} pixels is smaller than a patch of {patch} x {patch}"
        );
        Ok((height / patch, width / patch))
    }

    /// `[batch, 3, height, width]` -> what goes into the first block (index 0), then the output of every block, each
    /// `[batch, prefix + patches, hidden]`, before the last norm: Hugging Face's `hidden_states`. Positions are
    /// resampled for pictures of other sizes than it was trained for, as with `interpolate_pos_encoding`.
    ///
    /// # Panics
    /// Where the pictures are smaller than a patch, which [`VisionTransformer::grid`] tells.
    pub fn hidden_states(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        self.first_hidden_states(pixel_values, self.blocks.len())
    }

    /// As [`VisionTransformer::hidden_states`], of the first `num_layers` blocks only: `num_layers + 1` tensors.
    ///
    /// # Panics
    /// Where the model has fewer blocks.
    pub fn first_hidden_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let mut states = Vec::with_capacity(num_layers + 1);
        states.push(self.embed(pixel_values));
        for block in &self.blocks[..num_layers] {
            states.push(block.forward(&states[states.len() - 1]));
        }
        states
    }

    /// The norm after the last block: Hugging Face's `last_hidden_state` of the last hidden state. CLIP has none there.
    pub fn last_hidden_state(&self, hidden: &Tensor) -> Tensor {
        self.norm.as_ref().map_or_else(|| hidden.shallow_clone(), |norm| norm.forward(hidden))
    }

    /// `[batch, prefix + patches, hidden]` -> `[batch, patches, hidden]`, row by row
    pub fn patch_tokens(&self, hidden: &Tensor) -> Tensor {
        let prefix = self.num_prefix_tokens();
        hidden.narrow(1, prefix, hidden.size()[1] - prefix)
    }

    /// `[batch, 3, height, width]` -> `[batch, tokens, layers * hidden]`: the hidden states that a language model is
    /// given, side by side where several are chosen. Blocks after the last one chosen do not run.
    ///
    /// # Errors
    /// Where a chosen layer is none of this model's, or the pictures are smaller than a patch.
    pub fn features(&self, pixel_values: &Tensor, selection: &FeatureSelection) -> Result<Tensor> {
        let (_, _, height, width) = pixel_values.size4().context("pixel_values is [batch, 3, height, width]")?;
        self.grid(height, width)?;
        let layers = selection.hidden_state_indices(self.blocks.len())?;
        let last = layers.iter().copied().max().unwrap_or(0);
        let mut chosen: Vec<Option<Tensor>> = layers.iter().map(|_| None).collect();
        let mut hidden = self.embed(pixel_values);
        for i in 0..=last {
            if i > 0 {
                hidden = self.blocks[i - 1].forward(&hidden);
            }
            for (chosen, _) in chosen.iter_mut().zip(&layers).filter(|&(_, &layer)| layer == i) {
                *chosen = Some(match selection.vision_feature_select_strategy {
                    VisionFeatureSelectStrategy::Default => self.patch_tokens(&hidden),
                    VisionFeatureSelectStrategy::Full => hidden.shallow_clone(),
                });
            }
        }
        let chosen: Vec<Tensor> = chosen.into_iter().flatten().collect();
        Ok(Tensor::cat(&chosen, -1))
    }

    /// Visits every linear layer of the first `num_layers` blocks, by its name in the file that the transformer came from.
    /// Those that a file holds as one and Hugging Face's class as two or three (`attn.qkv` of Apple's AIMv2, `mlp.weights_in`
    /// of DINOv2-giant) are left out: no adapter of PEFT's would fit them.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears_mut(&mut self, num_layers: usize, visit: &mut Visit<'_>) -> Result<()> {
        let mut linears = self.blocks.iter_mut().take(num_layers).flat_map(Block::linears_mut);
        linears.try_for_each(|linear| visit(&linear.path, &mut linear.layer))
    }

    /// As [`linears_mut`](Self::linears_mut) of every block, without changing them.
    ///
    /// # Errors
    /// The first that `visit` returns.
    pub fn linears(&self, visit: &mut dyn FnMut(&str, &Linear) -> Result<()>) -> Result<()> {
        let mut linears = self.blocks.iter().flat_map(Block::linears);
        linears.try_for_each(|linear| visit(&linear.path, &linear.layer))
    }

    /// Lets `name` say what its linears are called.
    pub(crate) fn named(mut self, name: impl Fn(&str) -> String) -> Self {
        for linear in self.blocks.iter_mut().flat_map(Block::linears_mut) {
            linear.path = name(&linear.path);
        }
        self
    }

    /// The start for a student's own patch embedding.
    pub fn patchifier(&self) -> Patchifier<'_> {
        Patchifier {
            weight: self.embeddings.weight(),
            bias: self.embeddings.bias(),
            positions: self.embeddings.positions(self.side, self.side),
        }
    }

    fn embed(&self, pixel_values: &Tensor) -> Tensor {
        let embedded = self.embeddings.forward(pixel_values);
        match &self.pre_norm {
            Some(norm) => norm.forward(&embedded),
            None => embedded,
        }
    }
}

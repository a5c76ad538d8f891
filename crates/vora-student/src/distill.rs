//! The teacher's side: what a frozen module sees of a batch's pictures, for the heads to meet.

use std::path::Path;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::LlmConfig;
use vora_recipe::{DistillConfig, Pairing};
use vora_torch::weights::Weights;

use crate::heads::{DistillHeads, TeacherMean, resample};
use crate::teacher::Teacher;
use crate::teacher_cache::TeacherCache;

/// Pixels of one channel that the teacher looks at at once: sixteen pictures of 448 x 448.
const MAX_TEACHER_PIXELS: i64 = 16 * 448 * 448;

/// The teacher with all that serves to learn from it.
#[derive(Debug)]
pub struct Distill {
    teacher: Box<dyn Teacher>,
    heads: DistillHeads,
    states: Vec<usize>, // which of the teacher's each head meets, 0 being what goes into its first block
    patch_size: i64,    // the student's
    mean: Option<TeacherMean>,
    cache: Option<TeacherCache>,
}

impl Distill {
    /// Heads between `layers` of the student's blocks, of `num_hidden_layers`, and the teacher's, or as
    /// `distill.blocks` has them, on hidden states of `hidden_size`; a patch of the student's is `patch_size` wide.
    pub(crate) fn new(
        teacher: Box<dyn Teacher>,
        layers: usize,
        llm: &LlmConfig,
        patch_size: i64,
        config: &DistillConfig,
        trained: &Weights,
    ) -> Result<Self> {
        let (students, teachers) = (llm.num_hidden_layers, teacher.num_hidden_layers());
        let pairing = config.pairing.unwrap_or_default();
        // The released code has a head for each of the teacher's blocks, however many layers are adapted.
        let (first, layers) = match pairing {
            Pairing::Output => (1, layers),
            Pairing::Input => (teacher.first_hidden_state(), students),
        };
        let pairs = match &config.blocks {
            Some(blocks) => blocks.iter().map(|(student, teacher)| (*student, *teacher)).collect(),
            None => (0..layers.min(teachers)).map(|block| (block, block)).collect::<Vec<_>>(),
        };
        for &(student, teacher) in &pairs {
            ensure!(student < students, "distill.blocks has the LLM's block {student}, it has {students} from 0 on");
            ensure!(
                teacher < teachers,
                "distill.blocks gives block {student} the teacher's {teacher}, it has {teachers} from 0 on"
            );
        }
        let weights = trained.pp("aux_vision");
        let heads = DistillHeads::load(pairs, llm.hidden_size, teacher.hidden_size(), pairing, &weights)?;
        let states = heads.teacher_blocks().map(|block| block + first).collect();
        Ok(Self { teacher, heads, states, patch_size, mean: None, cache: None })
    }

    /// The heads.
    pub fn heads(&self) -> &DistillHeads {
        &self.heads
    }

    /// The teacher, to be counted.
    pub fn teacher(&self) -> &dyn Teacher {
        &*self.teacher
    }

    /// How many heads there are.
    pub fn num_heads(&self) -> usize {
        self.states.len()
    }

    /// Asks the teacher about a grey picture of `side` pixels, so that one that does not do as it says is told of before
    /// the first step.
    ///
    /// # Errors
    /// Says what of its hidden states is not as [`Teacher`] has it.
    pub(crate) fn check_teacher(&self, side: i64, device: Device) -> Result<()> {
        let picture = Tensor::zeros([1, 3, side, side], (Kind::Float, device));
        let layers = self.states.iter().copied().max().unwrap_or(0);
        let states = tch::no_grad(|| self.teacher.patch_states(&picture, layers));
        ensure!(
            states.len() > layers,
            "the teacher gives {} hidden states where {layers} blocks were asked for; they are one more than the blocks",
            states.len()
        );
        let (rows, columns) = self.teacher.grid(side, side);
        let expected = [1, rows * columns, self.teacher.hidden_size()];
        for &state in &self.states {
            let found = states[state].size();
            ensure!(
                found == expected,
                "the teacher's hidden state {state} of a picture of {side} x {side} pixels is {found:?}; by its grid and \
                 its hidden_size it is {expected:?}"
            );
        }
        Ok(())
    }

    /// Keeps the teacher's features in `folder`; the teacher was opened from `teacher`, and `view` says what it makes of a
    /// picture before it looks.
    pub(crate) fn keep_features(
        &mut self,
        folder: &Path,
        teacher: &Path,
        view: &str,
        device: Device,
        kind: Kind,
    ) -> Result<()> {
        self.cache = Some(TeacherCache::open(folder, teacher, view, &self.states, device, kind)?);
        Ok(())
    }

    /// Bytes that a picture of `height` x `width` takes in the cache; none without one.
    pub fn cached_bytes(&self, height: i64, width: i64, kind: Kind) -> Option<u64> {
        let (rows, columns) = self.teacher.grid(height, width);
        let elements = self.num_heads() as u64 * (rows * columns) as u64 * self.teacher.hidden_size() as u64;
        self.cache.as_ref().map(|_| elements * kind.elt_size_in_bytes() as u64)
    }

    /// Measures what is always the same in the teacher's features, over pictures `[n, 3, height, width]`, those of another
    /// grid than that of `side` x `side` pixels brought to it.
    ///
    /// # Errors
    /// See [`TeacherMean::measure`].
    pub fn measure_mean(&mut self, pictures: &[Tensor], side: i64, center: bool) -> Result<()> {
        let square = (side / self.patch_size, side / self.patch_size);
        let features = |batch: &Tensor| {
            let grid = self.grid(batch);
            Ok(self.features(batch).iter().map(|features| resample(features, grid, square)).collect())
        };
        self.mean = Some(tch::no_grad(|| TeacherMean::measure(pictures, center, features))?);
        Ok(())
    }

    /// What was measured, or loaded.
    pub fn mean(&self) -> Option<&TeacherMean> {
        self.mean.as_ref()
    }

    /// Takes what was measured before.
    pub fn set_mean(&mut self, mean: TeacherMean) {
        self.mean = Some(mean);
    }

    /// The outputs of the teacher's blocks that heads meet, on the student's grid, each
    /// `[pictures, patches, teacher_hidden]` in f32.
    fn features(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        let states = match &self.cache {
            Some(cache) => cache.features(pixel_values, |pictures| self.look(pictures)),
            None => self.look(pixel_values),
        };
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let (from, to) = (self.teacher.grid(height, width), self.grid(pixel_values));
        states.iter().map(|state| resample(&state.to_kind(Kind::Float), from, to)).collect()
    }

    /// The student's rows and columns of pictures `[batch, 3, height, width]`.
    fn grid(&self, pixel_values: &Tensor) -> (i64, i64) {
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        (height / self.patch_size, width / self.patch_size)
    }

    /// The same as the teacher computes it, on its own grid and in its dtype: in parts where there is much to see.
    fn look(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        let (_, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let layers = self.states.iter().copied().max().unwrap_or(0);
        let mut blocks: Vec<Vec<Tensor>> = self.states.iter().map(|_| Vec::new()).collect();
        for part in pixel_values.split((MAX_TEACHER_PIXELS / (height * width)).max(1), 0) {
            let states = self.teacher.patch_states(&part, layers);
            for (parts, &state) in blocks.iter_mut().zip(&self.states) {
                parts.push(states[state].shallow_clone());
            }
        }
        let whole =
            |parts: Vec<Tensor>| if parts.len() == 1 { parts[0].shallow_clone() } else { Tensor::cat(&parts, 0) };
        blocks.into_iter().map(whole).collect()
    }

    /// What the heads are to match, per block `[image tokens, teacher_hidden]`, in the order of the pictures.
    pub(crate) fn targets(&self, pixel_values: &[Tensor]) -> Result<Vec<Tensor>> {
        tch::no_grad(|| {
            let mut blocks: Vec<Vec<Tensor>> = self.states.iter().map(|_| Vec::new()).collect();
            for group in pixel_values.chunk_by(|a, b| a.size() == b.size()) {
                let pictures = Tensor::stack(group, 0);
                let mut features = self.features(&pictures);
                if let Some(mean) = &self.mean {
                    features = mean.center(features, self.grid(&pictures));
                }
                for (block, features) in blocks.iter_mut().zip(features) {
                    block.push(features.flatten(0, 1));
                }
            }
            Ok(blocks.iter().map(|groups| Tensor::cat(groups, 0)).collect())
        })
    }
}

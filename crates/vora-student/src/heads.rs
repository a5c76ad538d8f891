//! Block-wise distillation: the decoder's hidden states at image places learn to tell what a vision transformer sees.

use anyhow::{Result, ensure};
use tch::nn::Module;
use tch::{Kind, Tensor};
use vora_recipe::Pairing;
use vora_torch::checkpoint::Checkpoint;
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

/// One head: RMSNorm, then a linear map without bias.
#[derive(Debug)]
struct Head {
    norm: RmsNorm,
    proj: Tensor, // [teacher_hidden, hidden]
}

/// The trained maps from the decoder's space into the teacher's, one a block; they are gone after training.
///
/// Their names on disk are the published ones, `aux_layer_0.0.weight` (norm) and `aux_layer_0.1.weight` (linear).
#[derive(Debug)]
pub struct DistillHeads {
    heads: Vec<Head>,
    blocks: Vec<(usize, usize)>, // the student's, the teacher's
    pairing: Pairing,
}

impl DistillHeads {
    /// Heads for these pairs of the student's and the teacher's blocks, in rising order of the student's; they compute in the
    /// student's dtype, their losses in f32. `aux_layer_i` belongs to the student's block `i`.
    ///
    /// # Errors
    /// Where a weight is missing or has another shape.
    pub fn load(
        blocks: Vec<(usize, usize)>,
        hidden_size: i64,
        teacher_hidden_size: i64,
        pairing: Pairing,
        weights: &Weights,
    ) -> Result<Self> {
        let head = |block| {
            let weights = weights.pp(format!("aux_layer_{block}"));
            Ok(Head {
                norm: RmsNorm::load_trained(&weights.pp(0), hidden_size, 1e-5)?,
                proj: weights.pp(1).parameter("weight", &[teacher_hidden_size, hidden_size], Init::KaimingUniform)?,
            })
        };
        let heads = blocks.iter().map(|(student, _)| head(*student)).collect::<Result<_>>()?;
        Ok(Self { heads, blocks, pairing })
    }

    /// How many of the decoder's blocks must keep their hidden states for [`Self::losses`].
    pub fn hidden_layers(&self) -> usize {
        self.blocks.iter().map(|(student, _)| student + 1).max().unwrap_or(0)
    }

    /// The teacher's block that each head meets.
    pub fn teacher_blocks(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().map(|(_, teacher)| *teacher)
    }

    /// The loss of each head, `[blocks]` in f32: mean over image tokens of `1 - cosine(teacher, head(student))`.
    ///
    /// `hidden_states` are the decoder's, 0 the embeddings, each `[batch, seq, hidden]`; `places` `[tokens]` are the
    /// image tokens in `batch * seq`; `targets` are the teacher's blocks that the heads meet, each
    /// `[tokens, teacher_hidden]`.
    pub fn losses(&self, hidden_states: &[Tensor], places: &Tensor, targets: &[Tensor]) -> Tensor {
        let loss = |(student, target): (Tensor, &Tensor)| {
            let cosine = Tensor::cosine_similarity(&student, &target.to_kind(Kind::Float), -1, 1e-8);
            (1f64 - cosine).mean(Kind::Float)
        };
        let losses: Vec<Tensor> = self.outputs(hidden_states, places).zip(targets).map(loss).collect();
        Tensor::stack(&losses, 0)
    }

    /// What each head makes of the image tokens, `[tokens, teacher_hidden]` in f32.
    pub fn outputs<'a>(&'a self, hidden_states: &'a [Tensor], places: &'a Tensor) -> impl Iterator<Item = Tensor> + 'a {
        let first = match self.pairing {
            Pairing::Output => 1,
            Pairing::Input => 0,
        };
        self.heads.iter().zip(&self.blocks).map(move |(head, (student, _))| {
            let rows = hidden_states[student + first].flatten(0, 1).index_select(0, places); // [tokens, hidden]
            let proj = head.proj.to_kind(rows.kind());
            head.norm.forward(&rows).linear::<&Tensor>(&proj, None).to_kind(Kind::Float)
        })
    }
}

/// A vision transformer's features on another grid, as the student has it: `[n, rows * columns, hidden]`, between
/// neighbours in a line each way (`F.interpolate(mode="bilinear")`, corners not aligned).
pub fn resample(features: &Tensor, from: (i64, i64), to: (i64, i64)) -> Tensor {
    if from == to {
        return features.shallow_clone();
    }
    let (n, _, hidden) = features.size3().expect("features are [n, patches, hidden]");
    let grid = features.view([n, from.0, from.1, hidden]).permute([0, 3, 1, 2]); // [n, hidden, rows, columns]
    grid.upsample_bilinear2d([to.0, to.1], false, None, None).permute([0, 2, 3, 1]).flatten(1, 2)
}

/// What is always the same in the teacher's features: their mean at each position of a square grid, over some pictures.
///
/// Features of one position lie close together whatever the picture shows, so the cosine loss falls far by learning
/// the mean alone. [`TeacherMean::baseline`] tells how far; [`TeacherMean::center`] takes the mean out of the targets.
#[derive(Debug)]
pub struct TeacherMean {
    mean: Vec<Tensor>, // per block [side * side, teacher_hidden]; none where targets are not centred
    baseline: f64,
}

impl TeacherMean {
    /// Measures over `pictures`, batches of pixel values; `features` gives each block's `[batch, side * side, teacher_hidden]`.
    /// With `center` the mean is kept, and the baseline is that of what is left.
    ///
    /// # Errors
    /// Where there are less than two pictures, or `features` fails.
    pub fn measure(
        pictures: &[Tensor],
        center: bool,
        features: impl Fn(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<Self> {
        let n: i64 = pictures.iter().map(|batch| batch.size()[0]).sum();
        ensure!(n >= 2, "the mean of the teacher's features needs two pictures at least, there are {n}");
        let mut this = Self { mean: Vec::new(), baseline: 0.0 };
        if center {
            this.mean = sum_over(pictures, &features)?.into_iter().map(|sum| sum / n as f64).collect();
        }
        let unit = |batch: &Tensor| {
            let features = features(batch)?;
            let side = features[0].size()[1].isqrt();
            let features = this.center(features, (side, side));
            Ok(features.into_iter().map(|f| &f / f.norm_scalaropt_dim(2, [-1i64], true).clamp_min(1e-8)).collect())
        };
        // The best constant answer is the direction of the mean unit vector, and its mean cosine that vector's length;
        // the squared length over n pictures is corrected for what n random vectors would have.
        let n = n as f64;
        let mut cosines = Vec::new();
        for sum in sum_over(pictures, unit)? {
            let squared = (sum / n).square().sum_dim_intlist([-1i64].as_slice(), false, Kind::Float); // [patches]
            cosines.push(((squared * n - 1.0) / (n - 1.0)).clamp_min(0.0).sqrt().mean(Kind::Float).double_value(&[]));
        }
        this.baseline = 1.0 - cosines.iter().sum::<f64>() / cosines.len().max(1) as f64;
        Ok(this)
    }

    /// The cosine loss of the best answer that looks at no picture; only what lies below it was seen.
    pub fn baseline(&self) -> f64 {
        self.baseline
    }

    /// Features on a grid, each `[pictures, rows * columns, teacher_hidden]`, less their mean there, where that was asked for.
    pub fn center(&self, features: Vec<Tensor>, grid: (i64, i64)) -> Vec<Tensor> {
        if self.mean.is_empty() {
            return features;
        }
        let side = self.mean[0].size()[0].isqrt();
        let mean_at = |mean: &Tensor| resample(&mean.unsqueeze(0), (side, side), grid);
        features.into_iter().zip(&self.mean).map(|(features, mean)| features - mean_at(mean)).collect()
    }

    /// What [`Self::load`] takes back.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let means = self.mean.iter().enumerate().map(|(block, mean)| (format!("mean.{block}"), mean.shallow_clone()));
        means.chain([("baseline".to_owned(), Tensor::from(self.baseline))]).collect()
    }

    /// Takes back what [`Self::state`] gave.
    ///
    /// # Errors
    /// Where a tensor is missing.
    pub fn load(saved: &Checkpoint, device: tch::Device) -> Result<Self> {
        let blocks = saved.names().filter(|name| name.starts_with("mean.")).count();
        let mean = |block| Ok(saved.tensor(&format!("mean.{block}"))?.to_device(device));
        Ok(Self {
            mean: (0..blocks).map(mean).collect::<Result<_>>()?,
            baseline: saved.tensor("baseline")?.double_value(&[]),
        })
    }
}

/// Per block the sum over all pictures, `[patches, teacher_hidden]`.
fn sum_over(pictures: &[Tensor], features: impl Fn(&Tensor) -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let mut sums: Vec<Tensor> = Vec::new();
    for batch in pictures {
        let batch: Vec<Tensor> =
            features(batch)?.iter().map(|f| f.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)).collect();
        sums = if sums.is_empty() { batch } else { sums.iter().zip(&batch).map(|(sum, b)| sum + b).collect() };
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fixtures::Random;
    use tch::Device;

    fn golden_losses(golden: &fixtures::Golden, pairing: Pairing) -> (Tensor, Vec<Tensor>, Weights) {
        let weights = Weights::from_tensors(golden.under("distill.weights."), Device::Cpu, Kind::Float);
        let heads = DistillHeads::load(vec![(0, 0), (1, 1), (2, 2)], 16, 12, pairing, &weights).unwrap();
        weights.finish().unwrap();
        let tensors = |kind: &str| (0..=3).map(|i| golden[&*format!("distill.{kind}.{i}")].copy()).collect::<Vec<_>>();
        let states: Vec<Tensor> = tensors("state").into_iter().map(|t| t.set_requires_grad(true)).collect();
        let at_patches = |state: &Tensor| state.narrow(1, 1, 4).flatten(0, 1); // without the class token
        let targets: Vec<Tensor> = tensors("teacher")[1..].iter().map(at_patches).collect();
        (heads.losses(&states, &golden["distill.places"], &targets), states, weights)
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("losses");
        let (losses, states, weights) = golden_losses(&golden, Pairing::Output);
        fixtures::assert_close_to(&losses, &golden["distill.losses"], 1e-6);
        losses.mean(Kind::Float).backward();
        for (i, state) in states.iter().enumerate().skip(1) {
            fixtures::assert_close_to(&state.grad(), &golden[&*format!("distill.state_grad.{i}")], 1e-6);
        }
        for (name, parameter) in weights.parameters() {
            fixtures::assert_close_to(&parameter.grad(), &golden[&*format!("distill.grad.{name}")], 1e-6);
        }
        let (losses, ..) = golden_losses(&golden, Pairing::Input);
        fixtures::assert_close_to(&losses, &golden["distill.losses_input"], 1e-6);
    }

    #[test]
    fn blocks_meet_as_they_are_told() {
        let golden = fixtures::open("losses");
        let weights = Weights::from_tensors(golden.under("distill.weights."), Device::Cpu, Kind::Float);
        let heads = DistillHeads::load(vec![(0, 1), (2, 2)], 16, 12, Pairing::Output, &weights).unwrap();
        assert_eq!((heads.hidden_layers(), heads.teacher_blocks().collect::<Vec<_>>()), (3, vec![1, 2]));
        let at = |kind: &str, i: usize| golden[&*format!("distill.{kind}.{i}")].copy();
        let states: Vec<Tensor> = (0..=3).map(|i| at("state", i)).collect();
        let teacher = |block: usize| at("teacher", block + 1).narrow(1, 1, 4).flatten(0, 1);
        let losses = heads.losses(&states, &golden["distill.places"], &[teacher(1), teacher(2)]);
        // The last head meets what it met in the reference, the first another block.
        let expected = &golden["distill.losses"];
        fixtures::assert_close_to(&losses.get(1), &expected.get(2), 1e-6);
        assert!((losses.get(0) - expected.get(0)).abs().double_value(&[]) > 1e-3);
    }

    #[test]
    fn another_grid_is_that_of_torch() {
        let golden = fixtures::open("training");
        for (name, to) in [("finer", (8, 6)), ("coarser", (3, 2))] {
            let found = resample(&golden["grid.features"], (4, 3), to);
            fixtures::assert_close_to(&found, &golden[&*format!("grid.{name}")], 1e-6);
        }
        assert!(resample(&golden["grid.features"], (4, 3), (4, 3)).equal(&golden["grid.features"]));
    }

    /// Features of one block that are a constant and some noise: `[n, patches, 8]`.
    fn noisy(random: &Random, n: i64, noise: f64) -> Tensor {
        let constant = Tensor::ones([1, 4, 8], (Kind::Float, Device::Cpu));
        constant + random.normal([n, 4, 8]) * noise
    }

    #[test]
    fn the_baseline_is_what_a_constant_answer_reaches() {
        let random = Random::new(3);
        let identity = |batch: &Tensor| Ok(vec![batch.shallow_clone()]);
        let pictures = noisy(&random, 64, 0.5);
        let mean = TeacherMean::measure(&pictures.split(16, 0), false, identity).unwrap();
        let fresh = noisy(&random, 4096, 0.5);
        let constant = fresh.mean_dim([0i64].as_slice(), true, Kind::Float);
        let reached = 1.0 - Tensor::cosine_similarity(&fresh, &constant, -1, 1e-8).mean(Kind::Float).double_value(&[]);
        assert!((mean.baseline() - reached).abs() < 0.02, "{} {reached}", mean.baseline());
        // The same features twice: a constant answer is right.
        let same = TeacherMean::measure(&[noisy(&random, 1, 0.5).expand([4, 4, 8], false)], false, identity).unwrap();
        assert!(same.baseline().abs() < 1e-5, "{}", same.baseline());
    }

    #[test]
    fn centring_leaves_nothing_to_a_constant_answer() {
        let random = Random::new(4);
        let identity = |batch: &Tensor| Ok(vec![batch.shallow_clone(), batch * 2.0]);
        let pictures = noisy(&random, 256, 0.5);
        let mean = TeacherMean::measure(&pictures.split(100, 0), true, identity).unwrap();
        assert!(mean.baseline() > 0.9, "{}", mean.baseline());
        let centred = mean.center(vec![pictures.shallow_clone(), &pictures * 2.0], (2, 2));
        assert!(centred[1].mean_dim([0i64].as_slice(), false, Kind::Float).abs().max().double_value(&[]) < 1e-5);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("teacher_mean.safetensors");
        vora_torch::checkpoint::save(&path, &mean.state(), &[]).unwrap();
        let again = TeacherMean::load(&Checkpoint::open(&path).unwrap(), Device::Cpu).unwrap();
        assert_eq!(again.baseline().to_bits(), mean.baseline().to_bits());
        assert!(again.center(vec![pictures.shallow_clone()], (2, 2))[0].equal(&centred[0]));
        // On another grid the mean lies between its neighbours.
        let wide = again.center(vec![Tensor::zeros([1, 6, 8], (Kind::Float, Device::Cpu))], (2, 3));
        let between = -(again.mean[0].get(2) + again.mean[0].get(3)) / 2.0;
        fixtures::assert_close_to(&wide[0].get(0).get(4), &between, 1e-6);
    }

    #[test]
    fn one_picture_has_no_mean() {
        let error = TeacherMean::measure(&[noisy(&Random::new(5), 1, 1.0)], false, |b| Ok(vec![b.shallow_clone()]))
            .unwrap_err();
        assert!(error.to_string().contains("two pictures at least, there are 1"), "{error}");
    }
}

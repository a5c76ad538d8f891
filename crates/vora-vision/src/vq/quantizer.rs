//! Latents <-> codes, by the nearest entry of a codebook.

use anyhow::Result;
use tch::{Kind, Reduction, Tensor};
use vora_torch::weights::Init;

use super::config::VqConfig;
use super::params::Params;

/// Weight of the commitment loss (`beta` of arXiv 1711.00937, section 3.2).
const BETA: f64 = 0.25;

/// Distances that are held at once: 16 MB of them.
const MAX_DISTANCES: i64 = 1 << 22;

/// The codebook.
#[derive(Debug)]
pub(super) struct VectorQuantizer {
    embedding: Tensor, // [codes, embed_dim]
}

impl VectorQuantizer {
    pub(super) fn load(config: &VqConfig, params: &Params) -> Result<Self> {
        let shape = [config.num_embeddings, config.embed_dim];
        Ok(Self { embedding: params.pp("embedding").get("weight", &shape, Init::KaimingUniform)? })
    }

    /// The entry nearest to each latent, row by row: `[batch, embed_dim, rows, columns]` -> `[batch, rows * columns]`
    ///
    /// In f32 and without a graph. `|z - e|^2 = |z|^2 + 2 (|e|^2 / 2 - z e)`, of which only the bracket depends on `e`.
    pub(super) fn nearest(&self, latents: &Tensor) -> Tensor {
        tch::no_grad(|| {
            let (batch, embed_dim, _, _) = latents.size4().expect("latents are [batch, embed_dim, rows, columns]");
            let minus_z = -latents.permute([0, 2, 3, 1]).reshape([-1, embed_dim]).to_kind(Kind::Float);
            let entries = self.embedding.to_kind(Kind::Float);
            let half_squares = entries.square().sum_dim_intlist(1, false, Kind::Float) / 2; // [codes]
            let at_once = (MAX_DISTANCES / self.num_codes()).max(1);
            let codes: Vec<Tensor> = minus_z
                .split(at_once, 0)
                .iter()
                .map(|minus_z| half_squares.addmm(minus_z, &entries.tr()).argmin(1, false))
                .collect();
            Tensor::cat(&codes, 0).view([batch, -1])
        })
    }

    /// The entries of codes: `[batch, rows * columns]` -> `[batch, embed_dim, rows, columns]`
    pub(super) fn lookup(&self, codes: &Tensor, (rows, columns): (i64, i64)) -> Tensor {
        let entries = Tensor::embedding(&self.embedding, codes, -1, false, false); // [batch, rows * columns, embed_dim]
        entries.view([-1, rows, columns, self.embedding.size()[1]]).permute([0, 3, 1, 2])
    }

    /// Writes entries anew: `[n]`, `[n, embed_dim]`.
    pub(super) fn set(&self, codes: &Tensor, entries: &Tensor) {
        let _ = self.embedding.shallow_clone().index_copy_(0, codes, &entries.to_kind(self.embedding.kind()));
    }

    /// `|sg(z) - e|^2 + beta |z - sg(e)|^2`, the mean over all elements, where `sg` lets no gradient through: the
    /// codebook moves to the latents, and the latents, a quarter as fast, to the codebook (arXiv 1711.00937, equation 3).
    ///
    /// The code of the public VQGAN and Hugging Face's have the same value but weigh the other term with `beta`.
    pub(super) fn loss(latents: &Tensor, quantized: &Tensor) -> Tensor {
        let codebook = quantized.mse_loss(&latents.detach(), Reduction::Mean);
        let commitment = latents.mse_loss(&quantized.detach(), Reduction::Mean);
        codebook + BETA * commitment
    }

    /// The value of `quantized` with the gradient of `latents`: the straight-through estimator (ibid., section 3.2).
    pub(super) fn straight_through(latents: &Tensor, quantized: &Tensor) -> Tensor {
        latents + (quantized - latents).detach()
    }

    pub(super) fn num_codes(&self) -> i64 {
        self.embedding.size()[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;
    use vora_torch::weights::Weights;

    #[test]
    fn many_latents_are_looked_up_in_parts() {
        let random = fixtures::Random::new(1);
        let config = VqConfig { num_embeddings: 1 << 16, embed_dim: 2, ..VqConfig::tiny() };
        let weights = Weights::random(3, Device::Cpu, Kind::Float);
        let quantizer = VectorQuantizer::load(&config, &Params::new(&weights, false)).unwrap();
        let wanted = random.integers(0, 1 << 16, [2, 75]); // 64 fit at once
        let latents = quantizer.lookup(&wanted, (5, 15));
        assert_eq!(latents.size(), [2, 2, 5, 15]);
        let found = quantizer.nearest(&(latents.shallow_clone() + 1e-6));
        // Entries lie so close that rounding may choose a neighbour: as near, if not the same.
        let distance = (quantizer.lookup(&found, (5, 15)) - latents).abs().max().double_value(&[]);
        assert!(distance < 2e-3, "{distance}");
        let mut last = wanted.narrow(1, 74, 1);
        let _ = last.fill_(7);
        assert_eq!(quantizer.nearest(&quantizer.lookup(&wanted, (5, 15))).int64_value(&[1, 74]), 7);
    }

    #[test]
    fn gradients_go_where_the_paper_says() {
        let random = fixtures::Random::new(2);
        let leaf = || random.normal([2, 3, 4, 5]).set_requires_grad(true);
        let (latents, quantized) = (leaf(), leaf());
        VectorQuantizer::loss(&latents, &quantized).backward();
        let gradient = (&quantized - &latents).detach() * (2.0 / 120.0);
        fixtures::assert_close_to(&quantized.grad(), &gradient, 1e-7);
        fixtures::assert_close_to(&latents.grad(), &(gradient * -BETA), 1e-7);

        let (latents, quantized) = (leaf(), leaf());
        let through = VectorQuantizer::straight_through(&latents, &quantized);
        fixtures::assert_close_to(&through, &quantized, 1e-6);
        let weight = random.normal([2, 3, 4, 5]);
        (through * &weight).sum(Kind::Float).backward();
        fixtures::assert_close_to(&latents.grad(), &weight, 0.0);
        assert!(!quantized.grad().defined());
    }
}

//! Chameleon's image tokenizer (arXiv 2405.09818): a VQGAN (arXiv 2012.09841, 2203.13131) that turns a picture into codes
//! of one codebook, and codes into a picture.
//!
//! The tensors' names are those of the public VQGAN (CompVis' `taming-transformers`, `taming/models/vqgan.py`), which
//! Chameleon's own code takes over (facebookresearch/chameleon, `chameleon/inference/vqgan.py`): `encoder.*`,
//! `quant_conv`, `quantize.embedding`, `post_quant_conv`, `decoder.*`. Hugging Face's `ChameleonVQVAE` has the same names
//! without `decoder.*`: it reads pictures and draws none.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Reduction, Tensor, nn::Module};
use vora_torch::weights::Weights;

use super::blocks::Conv2d;
use super::config::VqConfig;
use super::decoder::Decoder;
use super::encoder::Encoder;
use super::params::Params;
use super::quantizer::VectorQuantizer;

/// Encoder, codebook, and the decoder where the weights have one.
#[derive(Debug)]
pub struct VqModel {
    config: VqConfig,
    encoder: Encoder,
    quant_conv: Conv2d,
    quantize: VectorQuantizer,
    post_quant_conv: Conv2d,
    decoder: Option<Decoder>,
    tensors: Vec<(String, Tensor)>,
}

/// What a [`VqModel`] is trained on: the sum of both losses.
#[derive(Debug)]
#[non_exhaustive]
pub struct VqLosses {
    /// Mean squared error of the decoded pictures, 0-dim.
    pub reconstruction: Tensor,
    /// Codebook loss + 0.25 of the commitment loss (arXiv 1711.00937, equation 3), 0-dim.
    pub quantization: Tensor,
    /// The codes that the pictures got, `[batch, rows * columns]`: how many differ tells whether the codebook is used.
    pub codes: Tensor,
}

impl VqModel {
    /// A frozen one.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(config: &VqConfig, weights: &Weights) -> Result<Self> {
        Self::take(config, &Params::new(weights, false))
    }

    /// One whose every tensor is an f32 parameter, registered with `weights`.
    ///
    /// # Errors
    /// As [`VqModel::load`].
    pub fn load_trained(config: &VqConfig, weights: &Weights) -> Result<Self> {
        Self::take(config, &Params::new(weights, true))
    }

    fn take(config: &VqConfig, params: &Params) -> Result<Self> {
        config.validate()?;
        let (latent, embed) = (config.latent_channels, config.embed_dim);
        let decoder = || Decoder::load(config, &params.pp("decoder"));
        Ok(Self {
            config: config.clone(),
            encoder: Encoder::load(config, &params.pp("encoder"))?,
            quant_conv: Conv2d::load(&params.pp("quant_conv"), latent, embed, 1)?,
            quantize: VectorQuantizer::load(config, &params.pp("quantize"))?,
            post_quant_conv: Conv2d::load(&params.pp("post_quant_conv"), embed, latent, 1)?,
            decoder: params.contains("decoder.conv_in.weight").then(decoder).transpose()?,
            tensors: params.taken(),
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &VqConfig {
        &self.config
    }

    /// Its tensors by their names on disk.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Whether it can draw: published folders of Hugging Face's Chameleon hold no decoder.
    pub fn has_decoder(&self) -> bool {
        self.decoder.is_some()
    }

    /// Rows and columns of codes of a picture.
    ///
    /// # Errors
    /// Where a side is not a positive multiple of [`VqConfig::stride`].
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        let stride = self.config.stride();
        ensure!(
            height > 0 && width > 0 && height % stride == 0 && width % stride == 0,
            "a picture of {width} x {height} pixels does not divide into codes of {stride} x {stride} pixels"
        );
        Ok((height / stride, width / stride))
    }

    /// The codes of pictures, row by row: `[batch, in_channels, height, width]` in [-1, 1] -> `[batch, rows * columns]`,
    /// without a graph.
    ///
    /// # Errors
    /// As [`VqModel::grid`], or where the channels are others.
    pub fn encode(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.check(pixel_values)?;
        Ok(tch::no_grad(|| self.quantize.nearest(&self.latents(pixel_values))))
    }

    /// The pictures of codes: `[batch, rows * columns]` -> `[batch, in_channels, rows * stride, columns * stride]` in
    /// [-1, 1], without a graph.
    ///
    /// # Errors
    /// Where the codes do not fill the grid, one is not in the codebook, or there is no decoder.
    pub fn decode(&self, codes: &Tensor, grid: (i64, i64)) -> Result<Tensor> {
        let (rows, columns) = grid;
        let size = codes.size();
        ensure!(
            size.len() == 2 && rows > 0 && columns > 0 && rows.checked_mul(columns) == Some(size[1]),
            "codes are {size:?}, a grid of {rows} rows and {columns} columns takes [batch, rows * columns]"
        );
        ensure!(matches!(codes.kind(), Kind::Int64 | Kind::Int), "codes are {:?}, they must be Int64", codes.kind());
        if codes.numel() > 0 {
            let (least, most) = (codes.min().int64_value(&[]), codes.max().int64_value(&[]));
            let num_codes = self.config.num_embeddings;
            ensure!(
                least >= 0 && most < num_codes,
                "codes go from {least} to {most}, the codebook has 0 to {}",
                num_codes - 1
            );
        }
        let decoder = self.decoder()?;
        let pixel_values = tch::no_grad(|| {
            let quantized = self.quantize.lookup(&codes.to_device(self.device()), grid);
            decoder.forward(&self.post_quant_conv.forward(&quantized))
        });
        Ok(pixel_values.clamp(-1.0, 1.0))
    }

    /// Encodes, looks up and decodes `[batch, in_channels, height, width]`, with a graph from both losses to every
    /// tensor: the decoder's gradient passes the codebook straight to the encoder.
    ///
    /// No perceptual and no adversarial loss, which the VQGAN adds to these.
    ///
    /// # Errors
    /// As [`VqModel::encode`], or where there is no decoder.
    pub fn losses(&self, pixel_values: &Tensor) -> Result<VqLosses> {
        let grid = self.check(pixel_values)?;
        let decoder = self.decoder()?;
        let latents = self.latents(pixel_values); // [batch, embed_dim, rows, columns]
        let codes = self.quantize.nearest(&latents);
        let quantized = self.quantize.lookup(&codes, grid);
        let through = VectorQuantizer::straight_through(&latents, &quantized);
        let decoded = decoder.forward(&self.post_quant_conv.forward(&through));
        Ok(VqLosses {
            reconstruction: decoded.mse_loss(&self.to_own(pixel_values), Reduction::Mean),
            quantization: VectorQuantizer::loss(&latents, &quantized),
            codes,
        })
    }

    /// Mean squared error of pictures that pass encoder and decoder without a codebook between them, with a graph to both.
    ///
    /// Latents have to mean something before it is worth while to number them: what is quantised from the first step on
    /// learns several times more slowly.
    ///
    /// # Errors
    /// As [`VqModel::losses`].
    pub fn reconstruction_without_codes(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.check(pixel_values)?;
        let decoded = self.decoder()?.forward(&self.post_quant_conv.forward(&self.latents(pixel_values)));
        Ok(decoded.mse_loss(&self.to_own(pixel_values), Reduction::Mean))
    }

    /// Moves entries of the codebook, `[n]`, to latents of these pictures, taken at equal distances, without a graph. With
    /// fewer latents than entries the last ones stay.
    ///
    /// An entry that is nearest to no latent gets no gradient and would stay so (random restarts, arXiv 2005.00341,
    /// section 3.1).
    ///
    /// # Errors
    /// As [`VqModel::encode`].
    pub fn restart_codes(&self, codes: &Tensor, pixel_values: &Tensor) -> Result<()> {
        self.check(pixel_values)?;
        tch::no_grad(|| {
            let latents = self.latents(pixel_values).permute([0, 2, 3, 1]).reshape([-1, self.config.embed_dim]);
            let available = latents.size()[0];
            let n = codes.size1()?.min(available);
            let at = Tensor::arange(n, (Kind::Int64, latents.device())) * available;
            let at = at.floor_divide_scalar(n.max(1));
            self.quantize.set(&codes.narrow(0, 0, n), &latents.index_select(0, &at));
            Ok(())
        })
    }

    /// `[batch, in_channels, height, width]` -> `[batch, embed_dim, rows, columns]`
    fn latents(&self, pixel_values: &Tensor) -> Tensor {
        self.quant_conv.forward(&self.encoder.forward(&self.to_own(pixel_values)))
    }

    /// In the dtype and on the device of its weights.
    fn to_own(&self, pixel_values: &Tensor) -> Tensor {
        pixel_values.to_device(self.device()).to_kind(self.encoder.kind())
    }

    fn device(&self) -> Device {
        self.encoder.device()
    }

    fn decoder(&self) -> Result<&Decoder> {
        self.decoder.as_ref().context("these weights have no `decoder.*`, pictures can be read but not drawn")
    }

    /// The grid of pictures of the right shape.
    fn check(&self, pixel_values: &Tensor) -> Result<(i64, i64)> {
        let (size, channels) = (pixel_values.size(), self.config.in_channels);
        ensure!(
            size.len() == 4 && size[1] == channels,
            "pixel values are {size:?}, pictures are [batch, {channels}, height, width]"
        );
        self.grid(size[2], size[3])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use fixtures::Golden;
    use serde_json::Value;
    use vora_torch::checkpoint;
    use vora_torch::optim::{AdamW, fused_adamw};

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// The weights that `generate/vq.py` makes, by the same arithmetic.
    fn noise(seed: usize, name: &str, shape: &[i64]) -> Tensor {
        let (count, inputs) = (shape.iter().product::<i64>(), shape[1..].iter().product::<i64>());
        let values: Vec<f32> = (0..count as u64)
            .map(|i| {
                let x = (i + seed as u64 * 1_000_003) * 2_654_435_761 % (1 << 32);
                let x = (x ^ (x >> 15)) * 668_265_263 % (1 << 32);
                let x = (x ^ (x >> 13)) as f64 / f64::from(2).powi(32) - 0.5;
                match shape.len() {
                    _ if name.ends_with(".bias") => x as f32,
                    1 => (x + 1.0) as f32,
                    _ => (x * (12.0 / inputs as f64).sqrt()) as f32,
                }
            })
            .collect();
        Tensor::from_slice(&values).view(shape)
    }

    /// Config and weights of a case of `generate/vq.py`, under HF's names and with HF's shapes.
    fn case(golden: &Golden, name: &str) -> (VqConfig, Vec<(String, Tensor)>) {
        let text = std::fs::read(fixtures::root().join("golden/vq.json")).unwrap();
        let case = serde_json::from_slice::<Value>(&text).unwrap()[name].take();
        let shapes: Vec<(String, Vec<i64>)> = serde_json::from_value(case["tensors"].clone()).unwrap();
        let tensors = shapes.iter().enumerate().map(|(seed, (key, shape))| {
            let tensor = match key.as_str() {
                "quantize.embedding.weight" => golden[&format!("{name}.embedding")].shallow_clone(),
                _ => noise(seed, key, shape),
            };
            (key.clone(), tensor)
        });
        (serde_json::from_value(case["config"].clone()).unwrap(), tensors.collect())
    }

    fn source(tensors: &[(String, Tensor)]) -> Weights {
        let tensors = tensors.iter().map(|(name, tensor)| (format!("model.vqmodel.{name}"), tensor.shallow_clone()));
        Weights::from_tensors(tensors, Device::Cpu, Kind::Float)
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("vq");
        for name in ["plain", "attention", "none"] {
            let (config, tensors) = case(&golden, name);
            let weights = source(&tensors);
            let model = VqModel::load(&config, &weights.pp("model.vqmodel")).unwrap();
            weights.finish().unwrap();

            let expected = |key: &str| golden[&format!("{name}.{key}")].shallow_clone();
            let pixel_values = expected("pixel_values");
            let (_, _, height, width) = pixel_values.size4().unwrap();
            let grid = model.grid(height, width).unwrap();
            fixtures::assert_close_to(&model.encoder.forward(&pixel_values), &expected("last_hidden_state"), 2e-5);
            let codes = model.encode(&pixel_values).unwrap();
            assert_eq!(codes.size(), [pixel_values.size()[0], grid.0 * grid.1]);
            assert!(codes.equal(&expected("image_tokens")), "{name}: codes differ");
            fixtures::assert_close_to(&model.quantize.lookup(&codes, grid), &expected("quantized"), 1e-5);

            // From the codes and from the latents, before the clamp.
            let decoded = model.decode(&codes, grid).unwrap();
            fixtures::assert_close(&decoded, &expected("decoded").clamp(-1.0, 1.0));
            let quantized = model.post_quant_conv.forward(&expected("quantized"));
            let decoded = model.decoder().unwrap().forward(&quantized);
            fixtures::assert_close(&decoded, &expected("decoded"));

            let losses = model.losses(&pixel_values).unwrap();
            fixtures::assert_close_to(&losses.quantization, &expected("embedding_loss"), 1e-5);
            let reconstruction = expected("decoded").mse_loss(&pixel_values, Reduction::Mean);
            fixtures::assert_close(&losses.reconstruction, &reconstruction);
            assert!(losses.codes.equal(&codes));
        }
    }

    #[test]
    fn saved_and_loaded_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vq.safetensors");
        let golden = fixtures::open("vq");
        let (config, tensors) = case(&golden, "attention");
        let model = VqModel::load(&config, &source(&tensors).pp("model.vqmodel")).unwrap();
        let mut saved = model.tensors();
        saved.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(saved.iter().map(|t| &t.0).collect::<Vec<_>>(), tensors.iter().map(|t| &t.0).collect::<Vec<_>>());
        checkpoint::save(&path, &saved, &[]).unwrap();
        let weights = Weights::open(&path, Device::Cpu, Kind::Float).unwrap();
        let config = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
        let again = VqModel::load(&config, &weights).unwrap();
        weights.finish().unwrap();
        let pixel_values = &golden["attention.pixel_values"];
        let codes = again.encode(pixel_values).unwrap();
        assert!(codes.equal(&model.encode(pixel_values).unwrap()));
        assert!(again.decode(&codes, (8, 12)).unwrap().equal(&model.decode(&codes, (8, 12)).unwrap()));
    }

    #[test]
    fn without_a_decoder_it_reads_and_says_that_it_cannot_draw() {
        let golden = fixtures::open("vq");
        let (config, mut tensors) = case(&golden, "plain");
        tensors.retain(|(name, _)| !name.starts_with("decoder."));
        let weights = source(&tensors);
        let model = VqModel::load(&config, &weights.pp("model.vqmodel")).unwrap();
        weights.finish().unwrap();
        assert!(!model.has_decoder());
        let codes = model.encode(&golden["plain.pixel_values"]).unwrap();
        assert!(codes.equal(&golden["plain.image_tokens"]));
        let error = model.decode(&codes, (8, 8)).unwrap_err().to_string();
        assert_eq!(error, "these weights have no `decoder.*`, pictures can be read but not drawn");
        assert!(model.losses(&golden["plain.pixel_values"]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let model = VqModel::load(&VqConfig::tiny(), &Weights::random(0, Device::Cpu, Kind::BFloat16)).unwrap();
        let codes = model.encode(&Tensor::zeros([2, 3, 8, 12], F32)).unwrap();
        assert_eq!(codes.size(), [2, 6]);
        let decoded = model.decode(&codes.to_kind(Kind::Int), (2, 3)).unwrap();
        assert_eq!((decoded.size(), decoded.kind()), (vec![2, 3, 8, 12], Kind::BFloat16));
        assert!(decoded.abs().max().double_value(&[]) <= 1.0);

        let refuse = |result: Result<Tensor>| result.unwrap_err().to_string();
        let error = refuse(model.encode(&Tensor::zeros([1, 3, 8, 10], F32)));
        assert_eq!(error, "a picture of 10 x 8 pixels does not divide into codes of 4 x 4 pixels");
        let error = refuse(model.encode(&Tensor::zeros([3, 8, 8], F32)));
        assert_eq!(error, "pixel values are [3, 8, 8], pictures are [batch, 3, height, width]");
        let error = refuse(model.decode(&codes, (3, 3)));
        assert_eq!(error, "codes are [2, 6], a grid of 3 rows and 3 columns takes [batch, rows * columns]");
        assert_eq!(
            refuse(model.decode(&codes.full_like(-1), (2, 3))),
            "codes go from -1 to -1, the codebook has 0 to 31"
        );
        assert_eq!(
            refuse(model.decode(&codes.full_like(32), (2, 3))),
            "codes go from 32 to 32, the codebook has 0 to 31"
        );
        assert!(refuse(model.decode(&Tensor::zeros([1, 4], F32), (2, 2))).contains("codes are Float"));
    }

    /// Sixteen pictures of 16 x 16 pixels: a square or a bar of one of four colours on one of two grounds.
    fn pictures() -> Tensor {
        let colours = [[1.0, -0.8, -0.8], [-0.8, 0.9, -0.6], [-0.7, -0.5, 1.0], [0.9, 0.9, -0.8]];
        let colour = |c: [f64; 3]| Tensor::from_slice(&c.map(|c| c as f32)).view([3, 1, 1]);
        let pictures: Vec<Tensor> = (0..16)
            .map(|i| {
                let ground = colour([[-0.9; 3], [0.7; 3]][i / 4 % 2]);
                let picture = ground.expand([3, 16, 16], false).copy();
                let (top, height) = if i < 8 { (2 + i as i64 % 3, 8) } else { (6, 3) };
                picture.narrow(1, top, height).narrow(2, 4, 9).copy_(&colour(colours[i % 4]));
                picture
            })
            .collect();
        Tensor::stack(&pictures, 0)
    }

    #[test]
    fn learns_a_few_pictures() {
        let weights = Weights::random(1, Device::Cpu, Kind::Float);
        let model = VqModel::load_trained(&VqConfig::tiny(), &weights).unwrap();
        let (params, pictures) = (weights.parameters(), pictures());
        assert_eq!(params.len(), model.tensors().len());
        let params: Vec<Tensor> = params.into_iter().map(|(_, tensor)| tensor).collect();
        let zeros = || params.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
        let (exp_avgs, exp_avg_sqs) = (zeros(), zeros());
        let steps: Vec<Tensor> = params.iter().map(|_| Tensor::from(0f32)).collect();
        let adamw = AdamW { lr: 2e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.0, eps: 1e-8 };
        let mut first = None;
        for step in 1..=80 {
            let losses = model.losses(&pictures).unwrap();
            (&losses.reconstruction + &losses.quantization).backward();
            let grads: Vec<Tensor> = params.iter().map(Tensor::grad).collect();
            for count in &steps {
                let _ = count.shallow_clone().fill_(f64::from(step));
            }
            tch::no_grad(|| fused_adamw(&params, &grads, &exp_avgs, &exp_avg_sqs, &steps, adamw)).unwrap();
            for param in &params {
                param.shallow_clone().zero_grad();
            }
            first.get_or_insert(losses.reconstruction.double_value(&[]));
        }
        let codes = model.encode(&pictures).unwrap();
        let last = model.decode(&codes, (4, 4)).unwrap().mse_loss(&pictures, Reduction::Mean).double_value(&[]);
        let first = first.unwrap();
        assert!(last < first / 10.0, "{first} -> {last}");
        let used = BTreeSet::from_iter(Vec::<i64>::try_from(codes.flatten(0, -1)).unwrap()).len();
        assert!(used >= 8, "only {used} codes are used");
    }
}

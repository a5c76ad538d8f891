//! Trains a tiny VQGAN on sixteen pictures, then sends them through their codes: `vq_roundtrip [OUT.png]`. Above the
//! pictures, below what came back; the codes of the first go to the standard output.

use std::env;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use vora_image::{RgbImage, chameleon_processor};
use vora_torch::optim::{AdamW, fused_adamw};
use vora_torch::weights::Weights;
use vora_vision::{VqConfig, VqModel, stack, to_images};

const STEPS: usize = 100;
const SIDE: u32 = 24;

#[expect(clippy::print_stdout, reason = "what an example shows")]
fn main() -> Result<()> {
    let path = env::args().nth(1).unwrap_or_else(|| "vq_roundtrip.png".to_owned());
    let processor = chameleon_processor(SIDE)?;
    let pixels = (0..16).map(|i| processor.preprocess(&picture(i))).collect::<Result<Vec<_>>>()?;
    let pixel_values = stack(&pixels)?; // [16, 3, SIDE, SIDE]

    let weights = Weights::random(0, Device::Cpu, Kind::Float);
    let model = VqModel::load_trained(&VqConfig::tiny(), &weights)?;
    train(&model, &weights, &pixel_values)?;

    let grid = model.grid(SIDE.into(), SIDE.into())?;
    let codes = model.encode(&pixel_values)?; // [16, 36]
    for row in Vec::<Vec<i64>>::try_from(codes.get(0).view(grid))? {
        println!("{}", row.iter().map(|code| format!("{code:3}")).collect::<String>());
    }
    let (before, after) = (to_images(&pixel_values)?, to_images(&model.decode(&codes, grid)?)?);
    sheet(&[&before, &after]).save(&path).with_context(|| format!("writing {path}"))
}

/// A disc of one of four colours, at one of four places.
fn picture(i: u32) -> RgbImage {
    let colour = [[230, 40, 40], [40, 200, 60], [50, 80, 240], [240, 220, 40]][i as usize % 4];
    let (x0, y0) = ([8, 16][i as usize / 4 % 2], [8, 16][i as usize / 8]);
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let inside = x.abs_diff(x0).pow(2) + y.abs_diff(y0).pow(2) < 36;
        if inside { colour.into() } else { [60 + 5 * y as u8; 3].into() }
    })
}

/// Both losses, AdamW, all pictures at each step.
#[expect(clippy::print_stdout, reason = "what an example shows")]
fn train(model: &VqModel, weights: &Weights, pixel_values: &Tensor) -> Result<()> {
    let params: Vec<Tensor> = weights.parameters().into_iter().map(|(_, tensor)| tensor).collect();
    let zeros = || params.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
    let (exp_avgs, exp_avg_sqs) = (zeros(), zeros());
    let counts: Vec<Tensor> = params.iter().map(|_| Tensor::from(0f32)).collect();
    let adamw = AdamW { lr: 2e-3, beta1: 0.9, beta2: 0.99, weight_decay: 0.0, eps: 1e-8 };
    for step in 1..=STEPS {
        let losses = model.losses(pixel_values)?;
        (&losses.reconstruction + &losses.quantization).backward();
        let grads: Vec<Tensor> = params.iter().map(Tensor::grad).collect();
        for count in &counts {
            let _ = count.shallow_clone().fill_(step as f64);
        }
        tch::no_grad(|| fused_adamw(&params, &grads, &exp_avgs, &exp_avg_sqs, &counts, adamw))?;
        for param in &params {
            param.shallow_clone().zero_grad();
        }
        if step % 20 == 0 {
            println!("step {step}/{STEPS}  reconstruction {:.4}", losses.reconstruction.double_value(&[]));
        }
    }
    Ok(())
}

/// Rows of pictures, side by side.
fn sheet(rows: &[&[RgbImage]]) -> RgbImage {
    let columns = rows[0].len() as u32;
    RgbImage::from_fn(columns * SIDE, rows.len() as u32 * SIDE, |x, y| {
        *rows[(y / SIDE) as usize][(x / SIDE) as usize].get_pixel(x % SIDE, y % SIDE)
    })
}

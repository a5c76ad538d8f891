//! What a step is made of beside the losses: AdamW over groups, averaged weights, the scale of f16's loss.

pub mod ema;
pub mod loss_scale;
pub mod optim;

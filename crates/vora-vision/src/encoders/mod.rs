//! The families of vision transformers, a file each: the keys of the config, where the tensors stand, what pictures go
//! through.

mod aimv2;
mod clip;
mod dinov2;
mod family;
mod siglip;
mod siglip2;
mod sizes;
mod vit;

pub use aimv2::Aimv2VisionConfig;
pub use clip::ClipVisionConfig;
pub use dinov2::Dinov2Config;
pub(crate) use family::Family;
pub use siglip::SiglipVisionConfig;
pub use siglip2::Siglip2VisionConfig;
pub use vit::VitConfig;

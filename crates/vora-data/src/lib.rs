//! Records to samples to batches: conversations, procedural scenes, worker threads.
//!
//! ```
//! use vora_data::scenes::{Scenes, ScenesConfig, Split};
//!
//! # fn main() -> anyhow::Result<()> {
//! let scenes = Scenes::new(ScenesConfig::default(), Split::Train)?;
//! let picture = scenes.render(7); // the same picture on every machine
//! assert_eq!(picture.dimensions(), (56, 56));
//! assert_eq!(scenes.questions(7).len(), 4);
//! # Ok(())
//! # }
//! ```

pub mod record;
pub mod scenes;

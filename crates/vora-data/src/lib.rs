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

pub mod batch;
pub mod loader;
pub mod record;
pub mod sample;
pub mod scenes;
mod shuffle;
pub mod source;

pub use batch::{Batch, SampleInfo, Supervised, collate};
pub use loader::{Loader, LoaderConfig};
pub use record::{Conversations, Record, RecordKeys, question_about};
pub use sample::{IGNORE_INDEX, QuestionSpan, Sample, SampleMaker};
pub use source::{Chain, ConversationSource, SceneSource, Source};

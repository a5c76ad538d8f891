//! From records to samples to batches. Records are conversations with their images, or preferences among answers, in JSON,
//! parquet files and WebDataset's tar shards, or `scenes`, a procedural dataset; sources of them are mixed by weight.
//! Worker threads make batches ahead of time, in an order that depends neither on their number nor on where a run was
//! interrupted. All of it is plain memory: no tensors are made here, no model is run, and nothing is downloaded.
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

mod batch;
mod error;
mod loader;
mod maker;
mod pack;
mod preparation;
mod prompts;
mod records;
mod sample;
pub mod scenes;
mod shuffle;
mod sources;
mod tokens;

pub use batch::{Batch, SampleInfo, Supervised, collate, collate_rows, collate_sharing};
pub use error::{DataError, TooLong};
pub use loader::{Loader, LoaderConfig, Peers};
pub use maker::SampleMaker;
pub use pack::pack;
pub use preparation::Preparation;
pub use records::{Conversations, IMAGE_PLACE, NO_MARK, Record, RecordKeys, short_name};
pub use sample::{IGNORE_INDEX, QuestionSpan, Sample};
pub use sources::{Chain, ConversationSource, Mix, RecordFiles, SceneSource, Source};
pub use vora_image::RgbImage;
pub use vora_text::{Message, Tokenizer};

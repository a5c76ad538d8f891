//! Sources of samples: scenes, files of records, several sources as one.

mod chain;
mod conversations;
mod files;
mod mix;
mod scenes;
mod shards;
mod source;
mod tar;

pub use chain::Chain;
pub use conversations::ConversationSource;
pub use files::RecordFiles;
pub use mix::Mix;
pub use scenes::SceneSource;
#[cfg(test)]
pub(crate) use source::Numbers;
pub use source::Source;

//! Parquet files as the hub has them: a row is a record, its images structs of `bytes` and `path`.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use crate::record::{MAX_LINE, MAX_RECORD, Record, RecordKeys};
use crate::shards::{Entry, Shard, Take};

/// No row group is larger, uncompressed: 4 GiB.
const MAX_ROW_GROUP: i64 = 4 << 30;

/// Columns of words, beside the key of conversations.
const WORDS: [&str; 4] = ["messages", "texts", "caption", "text"];

/// One row group of a parquet file.
pub(crate) struct RowGroup {
    path: PathBuf,
    keys: RecordKeys,
    group: usize,
    first: u64, // row of the file
    rows: u64,
}

/// The row groups of a file, by its footer.
pub(crate) fn row_groups(path: &Path, keys: &RecordKeys) -> Result<Vec<RowGroup>> {
    let groups = || {
        let reader = open(path)?;
        let schema = reader.metadata().file_metadata().schema();
        let columns: Vec<_> = schema.get_fields().iter().map(|field| field.name()).collect();
        ensure!(
            columns.iter().any(|name| *name == keys.conversations || WORDS.contains(name)),
            "it has no column `{}`, {}; its columns are {}",
            keys.conversations,
            WORDS.map(|name| format!("`{name}`")).join(", "),
            columns.join(", ")
        );
        let mut first = 0;
        let group = |(group, metadata): (usize, &parquet::file::metadata::RowGroupMetaData)| {
            let rows = u64::try_from(metadata.num_rows()).context("a row group has a negative number of rows")?;
            ensure!(
                metadata.total_byte_size() <= MAX_ROW_GROUP,
                "row group {group} has more than {} GiB; write it with smaller ones",
                MAX_ROW_GROUP >> 30
            );
            let group = RowGroup { path: path.to_owned(), keys: keys.clone(), group, first, rows };
            first += rows;
            Ok(group)
        };
        reader.metadata().row_groups().iter().enumerate().map(group).collect()
    };
    // A hostile footer may make the parquet crate panic.
    let groups = catch_unwind(AssertUnwindSafe(groups)).unwrap_or_else(|_| Err(anyhow!("its footer is broken")));
    groups.with_context(|| format!("cannot read {}", path.display()))
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    Ok(SerializedFileReader::new(File::open(path)?)?)
}

impl Shard for RowGroup {
    fn len(&self) -> Option<u64> {
        Some(self.rows)
    }

    fn read(&self, skip: u64, take: &mut Take<'_>) -> Result<()> {
        let mut read = || -> Result<()> {
            let reader = open(&self.path)?;
            let schema = reader.metadata().file_metadata().schema();
            let mut wanted: Vec<_> = schema.get_fields().iter().filter(|f| self.is_wanted(f.name())).cloned().collect();
            wanted.dedup();
            let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build()?;
            let group = reader.get_row_group(self.group)?;
            let rows = RowIter::from_row_group(Some(projection), &*group)?;
            for (row, number) in rows.zip(self.first + 1..).skip(usize::try_from(skip)?) {
                if !take(self.entry(row?, number)) {
                    break;
                }
            }
            Ok(())
        };
        read().with_context(|| format!("cannot read {}, row group {}", self.path.display(), self.group))
    }
}

impl RowGroup {
    fn is_wanted(&self, column: &str) -> bool {
        self.is_image(column) || column == "id" || column == self.keys.conversations || WORDS.contains(&column)
    }

    fn is_image(&self, column: &str) -> bool {
        [self.keys.frames.as_str(), "images", "image"].contains(&column)
    }

    fn entry(&self, row: Row, number: u64) -> Result<Entry> {
        let place = format!("{}: row {number}", self.path.display());
        let entry = || -> Result<_> {
            let (mut object, mut images) = (Map::new(), Vec::new());
            for (column, field) in row.into_columns() {
                if self.is_image(&column) {
                    add_images(field, &mut images).with_context(|| format!("its `{column}`"))?;
                } else {
                    object.insert(column.clone(), value(field).with_context(|| format!("its `{column}`"))?);
                }
            }
            let record = Record::with_images(object, &self.keys, images.len())?;
            Ok((record, images))
        };
        let (mut record, images) = entry().with_context(|| place.clone())?;
        if record.id.is_empty() {
            record.id.clone_from(&place);
        }
        Ok(Entry { place, record, images })
    }
}

/// An image, or a list of them: bytes, or a struct with `bytes`.
fn add_images(field: Field, images: &mut Vec<Vec<u8>>) -> Result<()> {
    match field {
        Field::Null => {}
        Field::Bytes(bytes) => {
            ensure!(bytes.len() as u64 <= MAX_RECORD, "an image has more than {} MiB", MAX_RECORD >> 20);
            images.push(bytes.data().to_vec());
        }
        Field::Group(row) => {
            let bytes = row.into_columns().into_iter().find(|(name, _)| name == "bytes").map(|(_, field)| field);
            match bytes {
                Some(bytes @ Field::Bytes(_)) => add_images(bytes, images)?,
                _ => bail!("an image has no bytes, only files that hold their images are read"),
            }
        }
        Field::ListInternal(list) => {
            for element in list.elements() {
                add_images(element.clone(), images)?;
            }
        }
        _ => bail!("an image is neither bytes nor a struct of bytes and path"),
    }
    Ok(())
}

fn value(field: Field) -> Result<Value> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::Str(text) => {
            ensure!(text.len() as u64 <= MAX_LINE, "a text has more than {} MiB", MAX_LINE >> 20);
            text.into()
        }
        Field::Group(row) => {
            let entry = |(name, field)| Ok((name, value(field)?));
            Value::Object(row.into_columns().into_iter().map(entry).collect::<Result<_>>()?)
        }
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect::<Result<_>>()?,
        other => bail!("a value is of a type that is not read: {other:.40}"),
    })
}

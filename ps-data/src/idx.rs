//! Reads IDX, the format of the MNIST files, from plain or gzip-compressed bytes.
//!
//! The header is not trusted. Memory grows with the bytes that are really read, and decompression stops one
//! byte after the announced end. So neither a giant count nor a gzip bomb takes more memory than the
//! largest accepted data set. Format (<http://yann.lecun.com/exdb/mnist/>): a big-endian magic number, one
//! `u32` per dimension, then `u8` values, last dimension fastest.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use crate::error::{DataError, IdxError};

/// Largest number of items that is accepted. EMNIST, the largest data set of the family, has 814,255.
pub(crate) const MAX_ITEMS: u32 = 1_000_000;

/// Size in bytes of the largest file that is read: `MAX_ITEMS` uncompressed images of 28×28 pixels, and some
/// room.
const MAX_FILE_BYTES: u64 = 800_000_000;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The contents that a file must have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// `u8` pixels, dimensions `[count, height, width]`.
    Images { height: u32, width: u32 },
    /// `u8` class indexes, dimensions `[count]`.
    Labels { num_classes: usize },
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Images { .. } => "images",
            Self::Labels { .. } => "labels",
        }
    }

    /// Third byte: element type (8 is `u8`); fourth: number of dimensions.
    pub(crate) fn magic(self) -> u32 {
        match self {
            Self::Images { .. } => 0x0803,
            Self::Labels { .. } => 0x0801,
        }
    }

    fn header_len(self) -> usize {
        match self {
            Self::Images { .. } => 16,
            Self::Labels { .. } => 8,
        }
    }
}

/// A decoded file: `count` items whose bytes are `body`.
#[derive(Debug)]
pub(crate) struct Idx {
    pub(crate) count: usize,
    pub(crate) body: Vec<u8>,
    header: Vec<u8>,
}

impl Idx {
    /// Hashes the uncompressed file, header included.
    pub(crate) fn content_sha256(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(&self.header);
        hasher.update(&self.body);
        hasher.finalize().into()
    }
}

/// Reads a whole file, compressed or not. It refuses everything but regular files of a plausible size.
pub(crate) fn read_raw(path: &Path) -> Result<Vec<u8>, DataError> {
    let read_error = |source| DataError::ReadFile {
        path: path.to_owned(),
        source,
    };
    // Checked before opening, because opening a named pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(read_error)?;
    if !metadata.is_file() {
        let found = match metadata.is_dir() {
            true => "it is a directory",
            false => "not a regular file",
        };
        let source = io::Error::new(io::ErrorKind::InvalidInput, found);
        return Err(read_error(source));
    }
    let mut raw = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut raw))
        .map_err(read_error)?;
    if raw.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES;
        return Err(DataError::Corrupt {
            path: path.to_owned(),
            source: IdxError::FileTooLarge { limit },
        });
    }
    Ok(raw)
}

/// Whether the file is compressed, according to its first bytes.
pub(crate) fn is_gzip(raw: &[u8]) -> bool {
    raw.starts_with(&GZIP_MAGIC)
}

/// Decodes the bytes of a file. Gzip is recognized by its magic number, not by the file's name.
pub(crate) fn decode(raw: &[u8], kind: Kind) -> Result<Idx, IdxError> {
    if is_gzip(raw) {
        decode_stream(MultiGzDecoder::new(raw), kind)
    } else {
        decode_stream(raw, kind)
    }
}

fn decode_stream(mut content: impl Read, kind: Kind) -> Result<Idx, IdxError> {
    let header_len = kind.header_len();
    let header = read_at_most(&mut content, header_len)?;
    if header.len() < header_len {
        return Err(IdxError::HeaderTruncated {
            expected: header_len,
            found: header.len(),
        });
    }
    let (count, item_len) = check_header(&header, kind)?;
    let expected = count * item_len;
    let body = read_at_most(&mut content, expected + 1)?;
    if body.len() < expected {
        return Err(IdxError::Truncated {
            expected,
            found: body.len(),
        });
    }
    if body.len() > expected {
        return Err(IdxError::TrailingBytes { expected });
    }
    if let Kind::Labels { num_classes } = kind
        && let Some(index) = body.iter().position(|&l| usize::from(l) >= num_classes)
    {
        return Err(IdxError::Label {
            index,
            label: body[index],
            num_classes,
        });
    }
    Ok(Idx {
        count,
        body,
        header,
    })
}

/// Returns the number of items and the bytes per item.
fn check_header(header: &[u8], kind: Kind) -> Result<(usize, usize), IdxError> {
    let word = |index: usize| {
        let bytes = header[4 * index..4 * index + 4].try_into();
        u32::from_be_bytes(bytes.expect("the slice has four bytes"))
    };
    let (magic, count) = (word(0), word(1));
    if magic != kind.magic() {
        return Err(IdxError::Magic {
            kind: kind.name(),
            expected: kind.magic(),
            found: magic,
        });
    }
    let mut item_len = 1;
    if let Kind::Images { height, width } = kind {
        let (expected, found) = ([height, width], [word(2), word(3)]);
        if expected != found {
            return Err(IdxError::ImageSize { expected, found });
        }
        item_len = (height * width) as usize;
    }
    if count == 0 {
        return Err(IdxError::Empty);
    }
    if count > MAX_ITEMS {
        return Err(IdxError::TooManyItems {
            limit: MAX_ITEMS,
            found: count,
        });
    }
    Ok((count as usize, item_len))
}

/// Reads up to `limit` bytes. The memory grows with the bytes that are read.
fn read_at_most(reader: &mut impl Read, limit: usize) -> Result<Vec<u8>, IdxError> {
    let mut bytes = Vec::with_capacity(limit.min(1 << 20));
    reader
        .take(limit as u64)
        .read_to_end(&mut bytes)
        .map_err(|source| IdxError::Gzip { source })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::*;

    const IMAGES: Kind = Kind::Images {
        height: 28,
        width: 28,
    };
    const LABELS: Kind = Kind::Labels { num_classes: 10 };

    fn images(count: u32, pixels: &[u8]) -> Vec<u8> {
        let header = [0x0803, count, 28, 28].map(u32::to_be_bytes).concat();
        [header, pixels.to_vec()].concat()
    }

    fn labels(count: u32, labels: &[u8]) -> Vec<u8> {
        let header = [0x0801, count].map(u32::to_be_bytes).concat();
        [header, labels.to_vec()].concat()
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).expect("writing to memory");
        encoder.finish().expect("writing to memory")
    }

    /// Decodes `content` plain and compressed and expects the same complaint from both.
    fn check(content: &[u8], kind: Kind, expected: &str) {
        for raw in [content.to_vec(), gzip(content)] {
            let error = decode(&raw, kind).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}: {expected}");
        }
    }

    #[test]
    fn well_formed_files_are_read_plain_and_compressed() {
        let pixels: Vec<u8> = (0..2 * 784).map(|i| (i % 251) as u8).collect();
        for raw in [images(2, &pixels), gzip(&images(2, &pixels))] {
            let idx = decode(&raw, IMAGES).expect("valid");
            assert_eq!((idx.count, idx.body), (2, pixels.clone()));
        }
        let idx = decode(&labels(3, &[7, 0, 9]), LABELS).expect("valid");
        assert_eq!((idx.count, idx.body), (3, vec![7, 0, 9]));
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let two = [0; 2 * 784];
        check(&[], IMAGES, "header of 16 bytes, found 0");
        check(&images(2, &two)[..15], IMAGES, "found 15 bytes");
        check(&labels(1, &[1]), IMAGES, "header of 16 bytes, found 9");
        check(
            &labels(9, &[1; 9]),
            IMAGES,
            "0x00000803 (images), found 0x00000801",
        );
        check(b"<!DOCTYPE html><html>", LABELS, "found 0x3c21444f");
        check(&images(0, &[]), IMAGES, "no items");
        check(
            &images(u32::MAX, &two),
            IMAGES,
            "announces 4294967295 items",
        );
        check(
            &images(1_000_000, &two),
            IMAGES,
            "784000000 bytes of items, found 1568",
        );
        check(
            &images(2, &two[1..]),
            IMAGES,
            "1568 bytes of items, found 1567",
        );
        check(&images(1, &two), IMAGES, "more than the 784 bytes");
        check(
            &labels(3, &[1, 10, 2]),
            LABELS,
            "label 10 of item 1 is not below 10",
        );
        let mut wide = images(2, &two);
        wide[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        check(&wide, IMAGES, "images of 28x28 pixels, found 28x4294967295");
    }

    #[test]
    fn damaged_gzip_streams_are_errors() {
        let whole = gzip(&labels(100, &[3; 100]));
        let truncated = &whole[..whole.len() - 3];
        let mut wrong_crc = whole.clone();
        let crc = whole.len() - 8;
        wrong_crc[crc] ^= 1;
        let trailing = [whole.as_slice(), b"garbage"].concat();
        for damaged in [truncated, &wrong_crc, &trailing] {
            let error = decode(damaged, LABELS).expect_err("damaged");
            assert!(matches!(error, IdxError::Gzip { .. }), "{error}");
        }
    }

    /// 1 GiB of zeros behind a header of one image: decoding may look one byte past the end only.
    #[test]
    fn a_gzip_bomb_stops_at_the_announced_end() {
        struct Counting<R>(R, usize);
        impl<R: Read> Read for Counting<R> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let n = self.0.read(buffer)?;
                self.1 += n;
                Ok(n)
            }
        }
        let header = images(1, &[]);
        let mut bomb = Counting(header.chain(io::repeat(0)), 0);
        let error = decode_stream(&mut bomb, IMAGES).expect_err("endless");
        assert!(matches!(error, IdxError::TrailingBytes { expected: 784 }));
        assert_eq!(bomb.1, 16 + 784 + 1);
    }

    #[test]
    fn a_directory_and_a_missing_file_are_read_errors_with_their_path() {
        let directory = tempfile::tempdir().expect("temporary directory");
        for path in [directory.path().to_owned(), directory.path().join("none")] {
            let error = read_raw(&path).expect_err("unreadable");
            assert!(error.to_string().contains(path.to_str().expect("UTF-8")));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = decode(&raw, IMAGES);
            let _ = decode(&raw, LABELS);
            let _ = decode(&gzip(&raw), IMAGES);
            let _ = decode(&[&GZIP_MAGIC[..], &[8, 0], &raw].concat(), LABELS);
        }

        /// Flips bytes of a valid file and cuts it; whatever still decodes has the announced size.
        #[test]
        fn mutated_files_never_panic_and_never_yield_a_wrong_size(
            compressed in any::<bool>(),
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            keep in any::<prop::sample::Index>(),
            cut in any::<bool>(),
        ) {
            let valid = images(2, &[17; 2 * 784]);
            let mut raw = if compressed { gzip(&valid) } else { valid };
            for (position, value) in &flips {
                let position = position.index(raw.len());
                raw[position] = *value;
            }
            if cut {
                raw.truncate(keep.index(raw.len()));
            }
            if let Ok(idx) = decode(&raw, IMAGES) {
                prop_assert_eq!(idx.body.len(), idx.count * 784);
            }
        }

        #[test]
        fn labels_survive_a_round_trip(body in proptest::collection::vec(0u8..10, 1..500)) {
            let raw = labels(body.len() as u32, &body);
            prop_assert_eq!(decode(&raw, LABELS).expect("valid").body, body.clone());
            prop_assert_eq!(decode(&gzip(&raw), LABELS).expect("valid").body, body);
        }
    }
}

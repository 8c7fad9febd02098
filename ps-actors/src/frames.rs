//! Frames in a file that is written from front to back and may be cut anywhere.
//!
//! A frame is an encoded value, its *head*, and perhaps many `f32` numbers:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the head in bytes |
//! | 8 | how many numbers there are |
//! | 4 | CRC-32 of the salt, the two fields above, the head and the numbers |
//! | … | the head, then the numbers |
//!
//! All integers and numbers are little-endian. The *salt* is a number that the file's reader knows. A file
//! that is written over an older one has another salt, so frames that are left from the older one do not
//! count.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufReader, IoSlice, Read, Write};

use ps_runtime::actor::error_chain;
use ps_runtime::codec::{BulkBytes, BulkValue};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest head that is read, in bytes. It holds an update of a million gradients.
const MAX_HEAD: u32 = 64 << 20;

const FIELDS: usize = 16;

/// Writes one frame. Returns its length in bytes.
///
/// # Errors
/// If the file cannot be written, or the value is too long. A part of the frame may have been written then.
pub(crate) fn write<T: Serialize>(
    file: &mut impl Write,
    salt: u64,
    value: &T,
    numbers: &[&[f32]],
) -> io::Result<u64> {
    let encoded = BulkValue::new(value).map_err(io::Error::other)?;
    let head: &[u8] = encoded.bytes();
    let num_numbers: u64 = numbers.iter().map(|part| part.len() as u64).sum();
    let numbers: Vec<_> = numbers.iter().map(|part| little_endian(part)).collect();
    let head_len = u32::try_from(head.len()).map_err(io::Error::other)?;
    let mut crc = crc_of(salt, head_len, num_numbers, head);
    numbers.iter().for_each(|bytes| crc.update(bytes));
    let mut fields = Vec::with_capacity(FIELDS);
    fields.extend_from_slice(&head_len.to_le_bytes());
    fields.extend_from_slice(&num_numbers.to_le_bytes());
    fields.extend_from_slice(&crc.finalize().to_le_bytes());
    let mut parts: Vec<_> = [&fields[..], head].map(IoSlice::new).into();
    parts.extend(numbers.iter().map(|bytes| IoSlice::new(bytes)));
    write_all(file, &mut parts)?;
    Ok((FIELDS + head.len()) as u64 + size_of::<f32>() as u64 * num_numbers)
}

fn crc_of(salt: u64, head_len: u32, num_numbers: u64, head: &[u8]) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&salt.to_le_bytes());
    crc.update(&head_len.to_le_bytes());
    crc.update(&num_numbers.to_le_bytes());
    crc.update(head);
    crc
}

/// `Write::write_all_vectored`, which is not stable.
fn write_all(file: &mut impl Write, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Empty parts at the front would look like a file that takes no more.
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match file.write_vectored(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(num_written) => IoSlice::advance_slices(&mut parts, num_written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns the numbers as they are in a file.
pub(crate) fn little_endian(numbers: &[f32]) -> Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => Cow::Borrowed(bytemuck::cast_slice(numbers)),
        false => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
    }
}

/// What comes next in a file.
#[derive(Debug)]
pub(crate) enum Next {
    Frame(Frame),
    End,
    /// The rest of the file is not a frame: it was cut, damaged, or never written.
    Cut,
}

#[derive(Debug)]
pub(crate) struct Frame {
    head: Vec<u8>,
    pub(crate) numbers: Vec<f32>,
}

impl Frame {
    /// Decodes the head.
    ///
    /// # Errors
    /// If it is not such a value. The error says why.
    pub(crate) fn value<T: Serialize + DeserializeOwned>(&self) -> Result<T, String> {
        let value = BulkValue::<T>::from(BulkBytes::from(&self.head[..]));
        value.read().map_err(|error| error_chain(&error))
    }
}

/// Reads frames, and checks each length before it allocates memory.
#[derive(Debug)]
pub(crate) struct FrameReader {
    file: BufReader<File>,
    salt: u64,
    /// The length of the file in bytes, and of what was read of it.
    len: u64,
    position: u64,
}

impl FrameReader {
    /// Reads the frames of a file after its first `position` bytes, which must have been read already.
    pub(crate) fn new(file: BufReader<File>, salt: u64, position: u64) -> io::Result<Self> {
        let len = file.get_ref().metadata()?.len();
        Ok(Self {
            file,
            salt,
            len,
            position,
        })
    }

    /// Uses another salt for the frames to come.
    pub(crate) fn set_salt(&mut self, salt: u64) {
        self.salt = salt;
    }

    /// Returns where the frames end that were read until now, in bytes from the beginning of the file.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn next(&mut self) -> io::Result<Next> {
        let left = self.len.saturating_sub(self.position);
        if left == 0 {
            return Ok(Next::End);
        }
        let mut fields = [0; FIELDS];
        if left < FIELDS as u64 || !self.fill(&mut fields)? {
            return Ok(Next::Cut);
        }
        let [a, b, c, d, numbers @ .., e, f, g, h] = fields;
        let head_len = u32::from_le_bytes([a, b, c, d]);
        let num_numbers = u64::from_le_bytes(numbers);
        let num_bytes = num_numbers.checked_mul(size_of::<f32>() as u64);
        let num_bytes = num_bytes.and_then(|bytes| bytes.checked_add(u64::from(head_len)));
        let Some(rest) = num_bytes.filter(|&rest| rest <= left - FIELDS as u64) else {
            return Ok(Next::Cut);
        };
        if head_len > MAX_HEAD {
            return Ok(Next::Cut);
        }
        let mut head = vec![0; head_len as usize];
        let mut numbers = vec![0_f32; num_numbers as usize];
        if !self.fill(&mut head)? || !self.fill(bytemuck::cast_slice_mut(&mut numbers))? {
            return Ok(Next::Cut);
        }
        let mut crc = crc_of(self.salt, head_len, num_numbers, &head);
        crc.update(bytemuck::cast_slice(&numbers));
        if crc.finalize() != u32::from_le_bytes([e, f, g, h]) {
            return Ok(Next::Cut);
        }
        if cfg!(target_endian = "big") {
            let swap = |number: &mut f32| *number = f32::from_bits(number.to_bits().swap_bytes());
            numbers.iter_mut().for_each(swap);
        }
        self.position += FIELDS as u64 + rest;
        Ok(Next::Frame(Frame { head, numbers }))
    }

    /// Returns `false` if the file ends before `bytes` are full.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        match self.file.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom};

    use super::*;

    fn read_all(path: &std::path::Path, salt: u64) -> (Vec<(u32, Vec<f32>)>, bool) {
        let file = BufReader::new(File::open(path).unwrap());
        let mut frames = FrameReader::new(file, salt, 0).unwrap();
        let mut all = Vec::new();
        loop {
            match frames.next().unwrap() {
                Next::Frame(frame) => all.push((frame.value().unwrap(), frame.numbers)),
                Next::End => return (all, false),
                Next::Cut => return (all, true),
            }
        }
    }

    #[test]
    fn frames_come_back_with_their_numbers_and_older_ones_do_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("frames");
        let mut file = File::create_new(&path).unwrap();
        let numbers = [vec![1.5, -0.0], vec![], vec![f32::MAX; 1000]];
        let parts: Vec<&[f32]> = numbers.iter().map(|part| &part[..]).collect();
        let joined = numbers.concat();
        let mut len = 0;
        for value in 0..3_u32 {
            len += write(&mut file, 7, &value, &parts).unwrap();
            len += write(&mut file, 7, &value, &[]).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), len);
        let (all, is_cut) = read_all(&path, 7);
        assert_eq!((all.len(), is_cut), (6, false));
        assert_eq!(all[4], (2, joined.clone()));
        assert_eq!(read_all(&path, 8), (vec![], true));

        // Written over, with another salt.
        file.seek(SeekFrom::Start(0)).unwrap();
        write(&mut file, 8, &9_u32, &parts).unwrap();
        assert_eq!(read_all(&path, 8), (vec![(9, joined)], true));
    }

    #[test]
    fn no_length_in_a_file_makes_a_reader_allocate_more_than_the_file_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("frames");
        for (head_len, num_numbers) in [
            (u32::MAX, 0),
            (0, u64::MAX),
            (0, u64::MAX / 4),
            (17, 1 << 40),
        ] {
            let mut bytes = Vec::new();
            bytes.extend_from_slice(&u32::to_le_bytes(head_len));
            bytes.extend_from_slice(&u64::to_le_bytes(num_numbers));
            bytes.extend_from_slice(&[0; 40]);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(read_all(&path, 0), (vec![], true));
        }
    }
}

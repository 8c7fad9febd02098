//! Makes the checksums of frames in a file right, so that an input gets past them, as if somebody who means harm had
//! written the file. The format is that of `ps-actors/src/frames.rs`.

const FIELDS: usize = 16;

/// The line of a file, up to its end, and then frames. The first frame has the salt 0; those after it have `salt`.
/// What is no whole frame stays as it is.
pub(crate) fn repair(mut bytes: Vec<u8>, salt: u64) -> Vec<u8> {
    let line = bytes.iter().position(|&byte| byte == b'\n');
    let (mut at, mut salt_now) = (line.map_or(0, |end| end + 1), 0);
    while let Some(frame) = bytes.get(at..) {
        let field = |from: usize| frame.get(from..);
        let (Some(&[a, b, c, d]), Some(&[e, f, g, h, i, j, k, l])) = (
            field(0).and_then(|bytes| bytes.first_chunk()),
            field(4).and_then(|bytes| bytes.first_chunk()),
        ) else {
            break;
        };
        let (head, numbers) = ([a, b, c, d], [e, f, g, h, i, j, k, l]);
        let num_bytes = u64::from_le_bytes(numbers)
            .checked_mul(4)
            .and_then(|bytes| bytes.checked_add(u32::from_le_bytes(head).into()))
            .and_then(|bytes| usize::try_from(bytes).ok());
        let end = num_bytes.and_then(|len| FIELDS.checked_add(len));
        let Some(end) = end.filter(|&end| end <= frame.len()) else {
            break;
        };
        let mut crc = crc32fast::Hasher::new();
        crc.update(&u64::to_le_bytes(salt_now));
        crc.update(&frame[..12]);
        crc.update(&frame[FIELDS..end]);
        let crc = crc.finalize().to_le_bytes();
        bytes[at + 12..at + FIELDS].copy_from_slice(&crc);
        (at, salt_now) = (at + end, salt);
    }
    bytes
}

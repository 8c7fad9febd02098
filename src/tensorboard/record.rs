//! The records of an event file: TensorFlow's framing around the protocol buffer `Event`. Pure.
//!
//! Five messages with a dozen fields are too few for a code generator: the crates for protocol buffers bring a
//! macro whose features would compile burn anew. The numbers of the fields are those of `event.proto` and
//! `summary.proto`: <https://github.com/tensorflow/tensorflow/tree/master/tensorflow/core>. The framing is that of
//! `tensorflow/core/lib/io/record_writer.h`.

/// A protocol buffer, field by field.
#[derive(Clone, Debug, Default)]
struct Message(Vec<u8>);

/// How a field is written.
enum Wire {
    Varint = 0,
    Bits64 = 1,
    Len = 2,
    Bits32 = 5,
}

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn key(&mut self, field: u64, wire: Wire) {
        self.varint(field << 3 | wire as u64);
    }

    fn int(mut self, field: u64, number: u64) -> Self {
        self.key(field, Wire::Varint);
        self.varint(number);
        self
    }

    fn double(mut self, field: u64, number: f64) -> Self {
        self.key(field, Wire::Bits64);
        self.0.extend(number.to_le_bytes());
        self
    }

    fn float(mut self, field: u64, number: f32) -> Self {
        self.key(field, Wire::Bits32);
        self.0.extend(number.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.key(field, Wire::Len);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn message(self, field: u64, message: &Self) -> Self {
        self.bytes(field, &message.0)
    }

    fn doubles(self, field: u64, numbers: impl Iterator<Item = f64>) -> Self {
        let packed: Vec<u8> = numbers.flat_map(f64::to_le_bytes).collect();
        self.bytes(field, &packed)
    }
}

/// When something happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct When {
    /// Seconds since 1970.
    pub(super) unix_time: f64,
    /// The version of the weights.
    pub(super) step: u64,
}

impl When {
    fn event(self) -> Message {
        // `wall_time` and `step`.
        Message::default()
            .double(1, self.unix_time)
            .int(2, self.step)
    }

    /// Adds the record that each file begins with.
    pub(super) fn add_header(self, out: &mut Vec<u8>) {
        // `file_version`. From version 2 on, only the record below makes TensorBoard drop points.
        add(&self.event().bytes(3, b"brain.Event:2"), out);
    }

    /// Adds a record that makes TensorBoard drop all points of this step and of later ones that it has read before.
    pub(super) fn add_restart(self, out: &mut Vec<u8>) {
        // `session_log`, with the `status` `START`.
        add(&self.event().message(7, &Message::default().int(1, 1)), out);
    }

    /// Adds a point of a curve.
    pub(super) fn add_scalar(self, tag: &str, value: f64, out: &mut Vec<u8>) {
        // `simple_value`
        self.add_value(tag, |message| message.float(2, value as f32), out);
    }

    /// Adds a histogram of whole numbers: item n of `counts` says how often n came. Does nothing if there are none.
    pub(super) fn add_histogram(self, tag: &str, counts: &[u64], out: &mut Vec<u8>) {
        let Some(first) = counts.iter().position(|&count| count > 0) else {
            return;
        };
        let last = counts.iter().rposition(|&count| count > 0).unwrap_or(first);
        let counts = || (first..).zip(counts[first..=last].iter().map(|&count| count as f64));
        let sum_of = |power: i32| -> f64 {
            counts()
                .map(|(n, count)| count * (n as f64).powi(power))
                .sum()
        };
        // Each bucket is one wide, with its number in the middle: TensorBoard draws no bucket without a width.
        let histogram = Message::default()
            .double(1, first as f64 - 0.5)
            .double(2, last as f64 + 0.5)
            .double(3, sum_of(0))
            .double(4, sum_of(1))
            .double(5, sum_of(2))
            .doubles(6, counts().map(|(n, _)| n as f64 + 0.5))
            .doubles(7, counts().map(|(_, count)| count));
        self.add_value(tag, |message| message.message(5, &histogram), out);
    }

    fn add_value(self, tag: &str, content: impl FnOnce(Message) -> Message, out: &mut Vec<u8>) {
        let value = content(Message::default().bytes(1, tag.as_bytes()));
        // `summary`, with one `value`.
        let summary = Message::default().message(1, &value);
        add(&self.event().message(5, &summary), out);
    }
}

/// Adds a record: its length and its bytes, each with a checksum.
fn add(message: &Message, out: &mut Vec<u8>) {
    let len = (message.0.len() as u64).to_le_bytes();
    out.extend(len);
    out.extend(checksum(&len).to_le_bytes());
    out.extend(&message.0);
    out.extend(checksum(&message.0).to_le_bytes());
}

/// CRC-32C, changed as TensorFlow does, because a checksum of data with checksums in them would be weak.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Reads records, for the tests of this module's neighbours.
#[cfg(test)]
pub(super) mod reading {
    use super::{When, checksum};

    #[derive(Clone, Debug, PartialEq)]
    pub(in super::super) struct Read {
        pub(in super::super) when: When,
        pub(in super::super) what: What,
    }

    #[derive(Clone, Debug, PartialEq)]
    pub(in super::super) enum What {
        Header(String),
        Restart,
        Scalar(String, f32),
        /// The counts of the buckets.
        Histogram(String, Vec<f64>),
    }

    /// Reads all records, and checks their checksums.
    pub(in super::super) fn read(mut bytes: &[u8]) -> Vec<Read> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let check = |at: usize, of: &[u8]| {
                let sum = bytes[at..at + 4].try_into().unwrap();
                assert_eq!(u32::from_le_bytes(sum), checksum(of));
            };
            check(8, &bytes[..8]);
            check(12 + len, &bytes[12..12 + len]);
            records.push(event(&bytes[12..12 + len]));
            bytes = &bytes[16 + len..];
        }
        records
    }

    fn event(bytes: &[u8]) -> Read {
        let fields = fields(bytes);
        let number = |wanted| fields.iter().find(|field| field.0 == wanted);
        let when = When {
            unix_time: double(number(1).unwrap().1),
            step: varint(&mut number(2).map_or(&[0][..], |field| field.1)),
        };
        let what = match fields.last().unwrap() {
            (3, version) => What::Header(text(version)),
            (5, summary) => value(super::reading::fields(summary)[0].1),
            (7, _) => What::Restart,
            (field, _) => panic!("field {field}"),
        };
        Read { when, what }
    }

    fn value(bytes: &[u8]) -> What {
        let fields = fields(bytes);
        let tag = text(fields[0].1);
        match fields[1] {
            (2, value) => What::Scalar(tag, f32::from_le_bytes(value.try_into().unwrap())),
            (5, histogram) => {
                let fields = super::reading::fields(histogram);
                let counts = fields.iter().find(|field| field.0 == 7).unwrap().1;
                What::Histogram(tag, counts.chunks(8).map(double).collect())
            }
            (field, _) => panic!("field {field}"),
        }
    }

    fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let len = match key & 7 {
                0 => bytes.iter().take_while(|&&byte| byte >= 0x80).count() + 1,
                1 => 8,
                2 => varint(&mut bytes) as usize,
                5 => 4,
                wire => panic!("wire type {wire}"),
            };
            let (field, rest) = bytes.split_at(len);
            fields.push((key >> 3, field));
            bytes = rest;
        }
        fields
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return number;
            }
        }
    }

    fn double(bytes: &[u8]) -> f64 {
        f64::from_le_bytes(bytes.try_into().unwrap())
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8(bytes.to_vec()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEN: When = When {
        unix_time: 1.5,
        step: 300,
    };

    #[test]
    fn the_checksum_is_that_of_tensorflow() {
        // From RFC 3720, B.4, with the change of record_writer.h.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let expected = 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(checksum(&[0; 32]), expected);
    }

    /// These bytes were written by TensorBoard's own classes in Python.
    #[test]
    fn records_have_the_bytes_that_tensorboard_writes() {
        let mut out = Vec::new();
        WHEN.add_scalar("loss", 0.25, &mut out);
        assert_eq!(hex(&out), SCALAR);
        out.clear();
        WHEN.add_histogram("s", &[0, 2, 0, 1], &mut out);
        assert_eq!(hex(&out), HISTOGRAM);
        out.clear();
        WHEN.add_restart(&mut out);
        assert_eq!(hex(&out), RESTART);
        out.clear();
        WHEN.add_header(&mut out);
        assert_eq!(hex(&out), HEADER);
        out.clear();
        WHEN.add_histogram("s", &[0, 0], &mut out);
        assert!(out.is_empty());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    const SCALAR: &str = "1b000000000000001a0d9e1309000000000000f83f10ac022a0d0a0b0a046c6f7373150000803e99\
        08deed";
    const HISTOGRAM: &str = "76000000000000004e43f07d09000000000000f83f10ac022a680a660a01732a6109000000000000\
        e03f110000000000000c401900000000000008402100000000000014402900000000000026403218\
        000000000000f83f00000000000004400000000000000c403a180000000000000040000000000000\
        0000000000000000f03fb6804d36";
    const RESTART: &str = "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a";
    const HEADER: &str = "1b000000000000001a0d9e1309000000000000f83f10ac021a0d627261696e2e4576656e743a320a\
        8dc5e4";
}

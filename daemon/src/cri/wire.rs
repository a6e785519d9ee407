//! Bytes on the wire: gRPC frames, and the one change that is made to a message.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::DecodeError;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use tonic::Status;

/// The largest message that containerd's CRI takes and sends (its `maxMsgSize`).
pub const MAX_MESSAGE: usize = 16 << 20;
/// The gRPC frame header: a compression flag and a big-endian length (gRPC over HTTP/2).
pub const FRAME_HEADER: usize = 5;

/// `message` as one uncompressed gRPC frame.
pub fn frame(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(FRAME_HEADER + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}

/// The one message of a unary body.
///
/// # Errors
/// A status as a gRPC server gives it when the body is not one whole, uncompressed message.
pub fn unframe(mut body: Bytes) -> Result<Bytes, Status> {
    if body.len() < FRAME_HEADER {
        return Err(Status::internal("the body ends inside a gRPC frame header"));
    }
    if body.get_u8() != 0 {
        return Err(Status::unimplemented("compressed gRPC messages are not supported here"));
    }
    let length = body.get_u32() as usize;
    if length != body.len() {
        return Err(Status::internal("the body is not exactly one gRPC message"));
    }
    Ok(body)
}

/// `request` (a `PullImageRequest` or `ImageStatusRequest`) with `image.image` replaced by
/// `reference`; every other byte, known or unknown, is kept.
///
/// # Errors
/// When `request` is not a protobuf message.
pub fn with_image(request: &[u8], reference: &str) -> Result<Vec<u8>, DecodeError> {
    /// `PullImageRequest.image` and `ImageStatusRequest.image`.
    const IMAGE_SPEC: u32 = 1;
    let mut changed = Vec::with_capacity(request.len() + reference.len());
    let mut seen = false;
    for_each_field(request, |tag, wire_type, field| {
        if tag != IMAGE_SPEC || wire_type != WireType::LengthDelimited {
            changed.extend_from_slice(field.whole);
            return Ok(());
        }
        let spec = spec_with_image(field.payload, reference)?;
        put_bytes(&mut changed, IMAGE_SPEC, &spec);
        seen = true;
        Ok(())
    })?;
    if !seen {
        put_bytes(&mut changed, IMAGE_SPEC, &spec_with_image(&[], reference)?);
    }
    Ok(changed)
}

fn spec_with_image(spec: &[u8], reference: &str) -> Result<Vec<u8>, DecodeError> {
    /// `ImageSpec.image`
    const IMAGE: u32 = 1;
    let mut changed = Vec::with_capacity(spec.len() + reference.len() + 4);
    put_bytes(&mut changed, IMAGE, reference.as_bytes());
    for_each_field(spec, |tag, _, field| {
        if tag != IMAGE {
            changed.extend_from_slice(field.whole);
        }
        Ok(())
    })?;
    Ok(changed)
}

struct Field<'a> {
    /// Key and value, as they came.
    whole: &'a [u8],
    /// The value of a length-delimited field; empty for the others.
    payload: &'a [u8],
}

fn for_each_field<'a>(
    message: &'a [u8],
    mut visit: impl FnMut(u32, WireType, Field<'a>) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    let mut rest = message;
    while rest.has_remaining() {
        let start = rest;
        let (tag, wire_type) = decode_key(&mut rest)?;
        let mut payload: &[u8] = &[];
        if wire_type == WireType::LengthDelimited {
            let mut value = rest;
            let length = decode_varint(&mut value)?;
            // Bounds are checked by `skip_field` on the same bytes just below.
            payload = usize::try_from(length).ok().and_then(|n| value.get(..n)).unwrap_or_default();
        }
        skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
        let whole = start.get(..start.len() - rest.len()).unwrap_or_default();
        visit(tag, wire_type, Field { whole, payload })?;
    }
    Ok(())
}

fn put_bytes(buffer: &mut Vec<u8>, tag: u32, value: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, buffer);
    encode_varint(value.len() as u64, buffer);
    buffer.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::cri::messages::{ImageSpec, PullImageRequest};

    fn unknown_field() -> Vec<u8> {
        let mut bytes = Vec::new();
        put_bytes(&mut bytes, 999, b"from the future");
        bytes
    }

    #[test]
    fn only_the_reference_changes() {
        let spec = ImageSpec { image: "old:tag".into(), runtime_handler: "kata".into() };
        let mut spec_bytes = spec.encode_to_vec();
        spec_bytes.extend(unknown_field());
        let mut request = unknown_field();
        put_bytes(&mut request, 1, &spec_bytes);
        put_bytes(&mut request, 2, b"\x0a\x01u");
        let changed = with_image(&request, "new@sha256:00").unwrap();

        let decoded = PullImageRequest::decode(changed.as_slice()).unwrap();
        assert_eq!(decoded.image.as_ref().unwrap().image, "new@sha256:00");
        assert_eq!(decoded.image.unwrap().runtime_handler, "kata");
        assert_eq!(decoded.auth.unwrap().username, "u");
        assert!(changed.starts_with(&unknown_field()));
        let kept = changed.windows(unknown_field().len()).filter(|w| *w == unknown_field()).count();
        assert_eq!(kept, 2, "unknown fields at both levels survive");
    }

    #[test]
    fn a_reference_written_twice_is_replaced_twice() {
        let old = ImageSpec { image: "old".into(), ..Default::default() }.encode_to_vec();
        let mut request = Vec::new();
        put_bytes(&mut request, 1, &[old.clone(), old.clone()].concat());
        put_bytes(&mut request, 1, &old);
        let changed = with_image(&request, "new").unwrap();
        assert_eq!(PullImageRequest::decode(changed.as_slice()).unwrap().image.unwrap().image, "new");
        assert!(!changed.windows(3).any(|w| w == b"old"));
    }

    #[test]
    fn a_request_without_image_gets_one() {
        let changed = with_image(&[], "new").unwrap();
        assert_eq!(PullImageRequest::decode(changed.as_slice()).unwrap().image.unwrap().image, "new");
    }

    #[test]
    fn broken_bytes_are_an_error_not_a_panic() {
        for length in 0..40_u8 {
            let bytes: Vec<u8> = (0..length).map(|i| i.wrapping_mul(37) ^ 0x0a).collect();
            let _ = with_image(&bytes, "x");
        }
        assert!(with_image(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], "x").is_err());
        assert!(unframe(Bytes::from_static(&[0, 0, 0, 0])).is_err());
        assert!(unframe(Bytes::from_static(&[1, 0, 0, 0, 0])).is_err());
        assert!(unframe(Bytes::from_static(&[0, 0, 0, 0, 2, 1])).is_err());
    }

    #[test]
    fn frames_are_undone() {
        assert_eq!(unframe(frame(b"abc")).unwrap(), Bytes::from_static(b"abc"));
    }
}

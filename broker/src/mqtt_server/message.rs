//! A message on its way through the server.

use bytes::{BufMut as _, Bytes, BytesMut};
use rumqttc::{LastWill, Publish, QoS, qos};

/// A published message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedMessage {
    /// Its topic, a valid one.
    pub topic: String,
    /// Its payload, in memory of its own.
    pub payload: Bytes,
    /// The quality of service that it was published with; the server knows 0 and 1.
    pub qos: QoS,
    /// From a publisher: it is to be retained. To a subscriber: it was retained.
    pub retain: bool,
}

impl PublishedMessage {
    /// A message of a publisher that is to be retained.
    #[cfg(test)]
    pub fn to_retain(topic: &str, payload: &str) -> Self {
        Self { topic: topic.into(), payload: payload.to_owned().into(), qos: QoS::AtLeastOnce, retain: true }
    }

    /// How many bytes topic and payload have.
    pub fn size(&self) -> usize {
        self.topic.len() + self.payload.len()
    }

    /// As the log has it: quality, length of the topic, topic, payload.
    pub fn encode(&self) -> Bytes {
        let length = u16::try_from(self.topic.len()).unwrap_or(u16::MAX);
        let topic = &self.topic.as_bytes()[..length.into()];
        let mut bytes = BytesMut::with_capacity(3 + topic.len() + self.payload.len());
        bytes.put_u8(self.qos as u8);
        bytes.put_u16(length);
        bytes.put_slice(topic);
        bytes.put_slice(&self.payload);
        bytes.freeze()
    }

    /// The topic of an encoded message.
    pub fn topic_of(bytes: &Bytes) -> Option<&str> {
        let length = u16::from_be_bytes(bytes.get(1..3)?.try_into().ok()?);
        std::str::from_utf8(bytes.get(3..3 + usize::from(length))?).ok()
    }

    /// The decoded message, which is not to be retained any more.
    pub fn decode(bytes: &Bytes) -> Option<Self> {
        let topic = Self::topic_of(bytes)?.to_owned();
        let qos = qos(*bytes.first()?).ok()?;
        let payload = bytes.slice(3 + topic.len()..);
        Some(Self { topic, payload, qos, retain: false })
    }
}

impl From<Publish> for PublishedMessage {
    fn from(publish: Publish) -> Self {
        let Publish { topic, payload, qos, retain, .. } = publish;
        // The payload is a part of a larger buffer of input, which must not stay because of it.
        Self { topic, payload: Bytes::copy_from_slice(&payload), qos: lower_qos(qos, QoS::AtLeastOnce), retain }
    }
}

impl From<LastWill> for PublishedMessage {
    fn from(will: LastWill) -> Self {
        let LastWill { topic, message, qos, retain } = will;
        Self { topic, payload: Bytes::copy_from_slice(&message), qos: lower_qos(qos, QoS::AtLeastOnce), retain }
    }
}

/// The lower one of two qualities.
pub fn lower_qos(one: QoS, other: QoS) -> QoS {
    if one < other { one } else { other }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_encoded_message_decodes_to_itself(topic in "\\PC{1,40}", payload: Vec<u8>, level in 0..2u8) {
            let qos = qos(level).unwrap();
            let message = PublishedMessage { topic, payload: payload.into(), qos, retain: false };
            let encoded = message.encode();
            prop_assert_eq!(PublishedMessage::topic_of(&encoded), Some(message.topic.as_str()));
            prop_assert_eq!(PublishedMessage::decode(&encoded), Some(message));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = PublishedMessage::decode(&bytes.into());
        }
    }
}

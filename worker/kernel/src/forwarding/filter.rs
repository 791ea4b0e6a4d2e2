//! The filter program of the kernel that drops packets which do not stay within a group of peers: classic BPF
//! (`linux/bpf_common.h`), whose result is an action of `linux/pkt_cls.h`. No IO.

use std::net::IpAddr;

use ipnet::IpNet;

/// An instruction, as `struct sock_filter` of `linux/filter.h` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    code: u16,
    /// How many instructions to skip if a comparison holds.
    then: u8,
    /// And if it does not.
    otherwise: u8,
    value: u32,
}

/// `BPF_LD` of a byte.
const LOAD_BYTE: u16 = 0x30;
/// `BPF_LD` of a word.
const LOAD_WORD: u16 = 0x20;
/// `BPF_MISC | BPF_TAX`: copies the accumulator to the index register.
const KEEP: u16 = 0x07;
/// `BPF_ALU | BPF_AND`.
const AND: u16 = 0x54;
/// `BPF_ALU | BPF_XOR | BPF_X`: with the index register.
const XOR_KEPT: u16 = 0xac;
/// `BPF_ALU | BPF_RSH`.
const SHIFT_RIGHT: u16 = 0x74;
/// `BPF_JMP | BPF_JEQ`.
const IF_EQUAL: u16 = 0x15;
/// `BPF_RET`.
const RETURN: u16 = 0x06;
/// `SKF_NET_OFF` of `linux/filter.h`: from the header of the network layer on.
const NETWORK_HEADER: u32 = 0xfff0_0000;
/// `TC_ACT_OK` of `linux/pkt_cls.h`.
const PASS: u32 = 0;
/// `TC_ACT_SHOT`.
const DROP: u32 = 2;

impl Instruction {
    fn new(code: u16, value: u32) -> Self {
        Self { code, then: 0, otherwise: 0, value }
    }

    /// As the kernel reads it.
    pub(super) fn bytes(self) -> [u8; 8] {
        let Self { code, then, otherwise, value } = self;
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&code.to_ne_bytes());
        bytes[2..4].copy_from_slice(&[then, otherwise]);
        bytes[4..].copy_from_slice(&value.to_ne_bytes());
        bytes
    }
}

/// The words of an address, and where source and destination stand in a header.
struct Family {
    version: u32,
    source: u32,
    destination: u32,
}

const IPV4: Family = Family { version: 4, source: 12, destination: 16 };
const IPV6: Family = Family { version: 6, source: 8, destination: 24 };

/// Passes packets whose source and destination are of the same group.
pub(super) fn program(pool: &[(IpNet, u8)]) -> Vec<Instruction> {
    pool.iter()
        .flat_map(|(network, length)| part(network.addr(), network.prefix_len(), *length))
        .chain([Instruction::new(RETURN, DROP)])
        .collect()
}

/// Decides about packets from one network of the pool, and goes on with others.
fn part(network: IpAddr, prefix: u8, length: u8) -> Vec<Instruction> {
    let (Family { version, source, destination }, words) = match network {
        IpAddr::V4(address) => (IPV4, vec![address.to_bits()]),
        IpAddr::V6(address) => (
            IPV6,
            address
                .octets()
                .chunks_exact(4)
                .map(|word| word.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)))
                .collect(),
        ),
    };
    let mut code = vec![
        Instruction::new(LOAD_BYTE, NETWORK_HEADER),
        Instruction::new(SHIFT_RIGHT, 4),
        Instruction::new(IF_EQUAL, version),
    ];
    for ((mask, word), offset) in masks(prefix).zip(words).zip((source..).step_by(4)) {
        code.push(Instruction::new(LOAD_WORD, NETWORK_HEADER + offset));
        code.push(Instruction::new(AND, mask));
        code.push(Instruction::new(IF_EQUAL, word & mask));
    }
    let decision = code.len();
    for (mask, offset) in masks(length).zip((0..).step_by(4)) {
        code.push(Instruction::new(LOAD_WORD, NETWORK_HEADER + source + offset));
        code.push(Instruction::new(KEEP, 0));
        code.push(Instruction::new(LOAD_WORD, NETWORK_HEADER + destination + offset));
        code.push(Instruction::new(XOR_KEPT, 0));
        code.push(Instruction::new(AND, mask));
        code.push(Instruction::new(IF_EQUAL, 0));
    }
    code.extend([Instruction::new(RETURN, PASS), Instruction::new(RETURN, DROP)]);
    let end = code.len();
    for (at, instruction) in code.iter_mut().enumerate().filter(|(_, instruction)| instruction.code == IF_EQUAL) {
        // To the next network, or to this one's DROP. At most 45 instructions are between.
        let to = if at < decision { end } else { end - 1 };
        instruction.otherwise = u8::try_from(to - at - 1).unwrap_or(u8::MAX);
    }
    code
}

/// The words of the mask of this length that are not all zero.
fn masks(length: u8) -> impl Iterator<Item = u32> {
    let lengths =
        (0..4).map(move |word| u32::from(length).saturating_sub(32 * word).min(32)).take_while(|bits| *bits > 0);
    lengths.map(|bits| u32::MAX << (32 - bits))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;
    use wgkex_common::address::tenants::TenantNetworks;

    use super::*;

    /// The kernel's action for a packet.
    fn run(program: &[Instruction], packet: &[u8]) -> u32 {
        let (mut at, mut accumulator, mut kept) = (0, 0_u32, 0_u32);
        loop {
            let Instruction { code, then, otherwise, value } = program[at];
            let place = value.wrapping_sub(NETWORK_HEADER) as usize;
            at += 1;
            match code {
                LOAD_BYTE => accumulator = packet[place].into(),
                LOAD_WORD => accumulator = u32::from_be_bytes(packet[place..place + 4].try_into().unwrap()),
                KEEP => kept = accumulator,
                AND => accumulator &= value,
                XOR_KEPT => accumulator ^= kept,
                SHIFT_RIGHT => accumulator >>= value,
                IF_EQUAL => at += usize::from(if accumulator == value { then } else { otherwise }),
                RETURN => return value,
                other => panic!("{other}"),
            }
        }
    }

    fn packet(from: IpAddr, to: IpAddr) -> Vec<u8> {
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => [&[0x45; 12][..], &from.octets(), &to.octets()].concat(),
            (IpAddr::V6(from), IpAddr::V6(to)) => [&[0x60; 8][..], &from.octets(), &to.octets()].concat(),
            _ => panic!("two families"),
        }
    }

    fn networks(pool: &[&str], tenant_length: u8) -> TenantNetworks {
        TenantNetworks { pool: pool.iter().map(|network| network.parse().unwrap()).collect(), tenant_length }
    }

    fn program_of(networks: &TenantNetworks) -> Vec<Instruction> {
        program(&networks.parts().collect::<Vec<_>>())
    }

    #[test]
    fn packets_stay_within_their_tenant() {
        let four = networks(&["10.64.0.0/10", "192.168.1.0/24", "192.168.2.0/24"], 20);
        let six = networks(&["fd00:1:2:3::/44", "fd00:2::/120"], 100);
        for (networks, from, to, expected) in [
            (&four, "10.64.0.1", "10.64.15.254", PASS),
            (&four, "10.64.0.1", "10.64.16.1", DROP),
            (&four, "10.64.0.1", "192.168.1.1", DROP),
            (&four, "10.64.0.1", "8.8.8.8", DROP),
            (&four, "8.8.8.8", "8.8.8.9", DROP),
            (&four, "192.168.1.1", "192.168.1.2", PASS),
            (&four, "192.168.1.1", "192.168.2.2", DROP),
            (&four, "192.168.2.1", "192.168.2.2", PASS),
            (&four, "fd00:1::1", "fd00:1::2", DROP),
            (&six, "fd00:1::1", "fd00:1::fff:ffff", PASS),
            (&six, "fd00:1::1", "fd00:1::1000:1", DROP),
            (&six, "fd00:2::1", "fd00:2::2", PASS),
            (&six, "fd00:2::1", "fd00:2::102", DROP),
            (&six, "10.64.0.1", "10.64.0.2", DROP),
        ] {
            let packet = packet(from.parse().unwrap(), to.parse().unwrap());
            assert_eq!(run(&program_of(networks), &packet), expected, "{from} {to}");
        }
    }

    /// The kernel takes 4096 instructions (`BPF_MAXINSNS` of `linux/bpf_common.h`), and the config 64 networks.
    #[test]
    fn the_program_fits_for_the_largest_pool() {
        let pool: Vec<_> = (0..64).map(|n| format!("fd00:{n}::/127")).collect();
        let pool: Vec<_> = pool.iter().map(String::as_str).collect();
        assert!(program_of(&networks(&pool, 124)).len() <= 4096);
    }

    proptest! {
        #[test]
        fn the_program_agrees_with_the_networks_of_tenants(
            prefix in 1_u8..=28, length in 8_u8..=28, bits: u32, from: u32, to: u32, near: bool, is_six: bool,
        ) {
            let (prefix, length) = if is_six { (prefix * 4, length * 4) } else { (prefix, length) };
            let address = |bits: u32| -> IpAddr {
                let wide = u128::from(bits);
                if is_six { Ipv6Addr::from(wide << 96 | wide << 40 | wide).into() } else { Ipv4Addr::from(bits).into() }
            };
            let pool = IpNet::new(address(bits), prefix).unwrap().trunc();
            let networks = TenantNetworks { pool: vec![pool], tenant_length: length };
            let (from, to) = if near { (bits ^ (from >> 24), bits ^ (to >> 20)) } else { (from, to) };
            let (from, to) = (address(from), address(to));
            let is_within = networks.of(from).is_some_and(|network| network.contains(&to));
            prop_assert_eq!(run(&program_of(&networks), &packet(from, to)) == PASS, is_within);
        }
    }
}

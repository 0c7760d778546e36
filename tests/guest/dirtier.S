# The test guest: a freestanding i386 program of a few KB that dirties memory at a set rate, checks what it wrote
# before, and ticks on COM1. Started by `-kernel dirtier.elf -append "rate=1000 …"` (Multiboot 1).
#
# Parameters, all decimal, all optional:
#   rate=N    pages written per second; 0 = idle (halted between timer interrupts)      default 0
#   run=N     N consecutive pages, then another random place; 0 = sequential for ever   default 1
#   mib=N     the region that is written, MiB from 8 MiB on                             default 64
#   soft=1    pages that compress to about a third (otherwise incompressible)           default 0
#   zero=N    every Nth page written becomes all zero; 0 = none                         default 0
#   fill=1    write the whole region once before "ready"                                default 0
#   hz=N      timer interrupts per second, 20 to 1000                                   default 100
#   tick=N    timer interrupts per tick line                                            default 10
#   check=N   pages checked per tick line                                               default 8
#   seed=N    of the random places                                                      default 1
#
# Lines on COM1: "ready <pages in region>", "tick <n> pages <written> checked <n>", "error page <index>", "quiet".
# A byte received on COM1, looked at once per tick: 'q' makes it quiet: it writes "quiet" and halts with interrupts
# off, for good; 'x' spoils one word in every page of the region, so that its checks can be seen to fail.
#
# Each page carries (index, generation, a mix of both, magic) and a content that follows from index and
# generation; the table at 2 MiB holds the generation that each page must have. A page that came back older,
# newer, torn or elsewhere is therefore seen. Bit 31 of a table entry: the page was written as all zero.

.intel_syntax noprefix
.code32

.set TABLE, 0x200000            # u32 for each page of the region
.set REGION, 0x800000           # page aligned; the table must end before it
.set REGION_MIB_MAX, 3000       # below the hole for devices, and a table of 3 MiB
.set MAGIC, 0x5254494d
.set COM1, 0x3f8
.set PIT_HZ, 1193182

.section .multiboot, "a"
.align 4
    .long 0x1badb002, 0x00000002, -(0x1badb002 + 0x00000002)    # flag 2: tell the memory size

.text
.globl start
start:
    mov esp, offset stack_top
    cld
    cmp eax, 0x2badb002
    jne dead
    mov [mbi], ebx
    lgdt [gdt_pointer]
    jmp 0x08:1f
1:  mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, cr0                # SSE: no emulation, monitor coprocessor
    and eax, ~4
    or eax, 2
    mov cr0, eax
    mov eax, cr4
    or eax, 0x200               # OSFXSR
    mov cr4, eax
    call serial_init
    call parse_parameters
    call check_parameters
    call fill_region
    call interrupts_init
    mov esi, offset text_ready
    call print
    mov eax, [region_pages]
    call print_number
    call print_newline

main_loop:
    sti
    hlt
    cli
    mov eax, [interrupts]
    sub eax, [interrupts_seen]
    jz main_loop
    add [interrupts_seen], eax
    cmp eax, 20                 # far behind: what is lost is lost
    jbe 1f
    mov eax, 20
1:  mul dword ptr [value_rate]
    add [owed], eax
    sti
2:  mov eax, [owed]
    cmp eax, [value_hz]
    jb 3f
    sub eax, [value_hz]
    mov [owed], eax
    call write_next_page
    jmp 2b
3:  mov eax, [interrupts]
    sub eax, [interrupts_ticked]
    cmp eax, [value_tick]
    jb main_loop
    mov eax, [interrupts]
    mov [interrupts_ticked], eax
    call tick
    jmp main_loop

# Prints the tick line, checks pages, obeys a command.
tick:
    mov ecx, [value_check]
    jecxz 2f
1:  push ecx
    call check_random_page
    pop ecx
    loop 1b
2:  inc dword ptr [ticks]
    mov esi, offset text_tick
    call print
    mov eax, [ticks]
    call print_number
    mov esi, offset text_pages
    call print
    mov eax, [pages_written]
    call print_number
    mov esi, offset text_checked
    call print
    mov eax, [pages_checked]
    call print_number
    call print_newline
    mov dx, COM1 + 5
    in al, dx
    test al, 1
    jz 3f
    mov dx, COM1
    in al, dx
    cmp al, 'q'
    je quiet
    cmp al, 'x'
    jne 3f
    mov ecx, [region_pages]
    mov edi, REGION + 2048
4:  inc dword ptr [edi]
    add edi, 4096
    loop 4b
3:  ret

quiet:
    cli
    mov esi, offset text_quiet
    call print
    call print_newline
dead:
    cli
    hlt
    jmp dead

# ---- pages -------------------------------------------------------------------------------------------------

# Chooses the next page by the pattern and writes it.
write_next_page:
    mov eax, [run_left]
    test eax, eax
    jnz 2f
    mov eax, [value_run]
    test eax, eax
    jz 3f                       # sequential: no new place
    mov [run_left], eax
    call random_page
    mov [next_page], eax
2:  dec dword ptr [run_left]
3:  mov eax, [next_page]
    lea ecx, [eax + 1]
    cmp ecx, [region_pages]
    jb 4f
    xor ecx, ecx
4:  mov [next_page], ecx
    # fall through

# Writes page eax in its next generation.
write_page:
    inc dword ptr [pages_written]
    mov ebx, [TABLE + eax * 4]
    and ebx, 0x7fffffff
    inc ebx
    mov ecx, [value_zero]
    jecxz 1f
    dec dword ptr [until_zero]
    jnz 1f
    mov [until_zero], ecx
    or ebx, 0x80000000
1:  mov [TABLE + eax * 4], ebx
    mov edi, eax
    shl edi, 12
    add edi, REGION
    mov edx, 4096 / 64
    test ebx, ebx
    js 3f
    call content
2:  movaps [edi], xmm0
    paddd xmm0, xmm1
    movaps [edi + 16], xmm0
    paddd xmm0, xmm2
    movaps [edi + 32], xmm0
    paddd xmm0, xmm2
    movaps [edi + 48], xmm0
    paddd xmm0, xmm2
    add edi, 64
    dec edx
    jnz 2b
    ret
3:  pxor xmm0, xmm0
4:  movaps [edi], xmm0
    movaps [edi + 16], xmm0
    movaps [edi + 32], xmm0
    movaps [edi + 48], xmm0
    add edi, 64
    dec edx
    jnz 4b
    ret

# Page eax, generation ebx: xmm0 = its first 16 bytes, xmm1 and xmm2 = what is added from each 16 bytes to the next.
# Every 32-bit lane counts up by an odd step of its own, which neither repeats within a page nor favours a byte.
content:
    imul ecx, ebx, 0x9e3779b1
    imul ebp, eax, 0x85ebca6b
    xor ecx, ebp
    mov [vector], eax
    mov [vector + 4], ebx
    mov [vector + 8], ecx
    mov dword ptr [vector + 12], MAGIC
    movaps xmm0, [vector]
    or ecx, 1
    mov [vector], ecx
    imul ecx, ecx, 0x41c64e6d
    mov [vector + 4], ecx
    imul ecx, ecx, 0x41c64e6d
    mov [vector + 8], ecx
    imul ecx, ecx, 0x41c64e6d
    mov [vector + 12], ecx
    movaps xmm1, [vector]
    movaps xmm2, xmm1
    cmp dword ptr [value_soft], 0
    je 1f
    pxor xmm2, xmm2             # soft: three of four repeat the one before
1:  ret

# Checks one random page, all of it, if it was ever written.
check_random_page:
    call random_page
    mov ebx, [TABLE + eax * 4]
    test ebx, ebx
    jz 6f
    inc dword ptr [pages_checked]
    push eax
    mov edi, eax
    shl edi, 12
    add edi, REGION
    mov edx, 4096 / 64
    test ebx, ebx
    js 3f
    call content
    jmp 1f
3:  pxor xmm0, xmm0
    pxor xmm1, xmm1
    pxor xmm2, xmm2
1:  movaps xmm3, [edi]
    pcmpeqd xmm3, xmm0
    paddd xmm0, xmm1
    movaps xmm4, [edi + 16]
    pcmpeqd xmm4, xmm0
    pand xmm3, xmm4
    paddd xmm0, xmm2
    movaps xmm4, [edi + 32]
    pcmpeqd xmm4, xmm0
    pand xmm3, xmm4
    paddd xmm0, xmm2
    movaps xmm4, [edi + 48]
    pcmpeqd xmm4, xmm0
    pand xmm3, xmm4
    paddd xmm0, xmm2
    pmovmskb ecx, xmm3
    cmp ecx, 0xffff
    jne 4f
    add edi, 64
    dec edx
    jnz 1b
    pop eax
    ret
4:  mov esi, offset text_error
    call print
    pop eax
    call print_number
    call print_newline
6:  ret

# eax = a random page of the region (xorshift32). Clobbers ecx, edx.
random_page:
    mov eax, [value_seed]
    mov ecx, eax
    shl ecx, 13
    xor eax, ecx
    mov ecx, eax
    shr ecx, 17
    xor eax, ecx
    mov ecx, eax
    shl ecx, 5
    xor eax, ecx
    mov [value_seed], eax
    mul dword ptr [region_pages]
    mov eax, edx
    ret

fill_region:
    cmp dword ptr [value_fill], 0
    je 2f
    xor eax, eax
1:  push eax
    call write_page
    pop eax
    inc eax
    cmp eax, [region_pages]
    jb 1b
2:  ret

# ---- parameters --------------------------------------------------------------------------------------------

# Reads "name=number" words from the Multiboot command line; other words are passed over.
parse_parameters:
    mov ebx, [mbi]
    test dword ptr [ebx], 4     # is there a command line?
    jz 9f
    mov esi, [ebx + 16]
1:  mov al, [esi]               # start of a word
    test al, al
    jz 9f
    cmp al, ' '
    jne 2f
    inc esi
    jmp 1b
2:  mov ebx, offset parameters
3:  mov edi, [ebx]
    test edi, edi
    jz 7f                       # no parameter of this name
    mov edx, esi
4:  mov al, [edi]
    test al, al
    jz 5f
    cmp al, [edx]
    jne 6f
    inc edi
    inc edx
    jmp 4b
5:  xor eax, eax                # digits
8:  movzx ecx, byte ptr [edx]
    sub ecx, '0'
    cmp ecx, 9
    ja 10f
    imul eax, eax, 10
    add eax, ecx
    inc edx
    jmp 8b
10: mov edi, [ebx + 4]
    mov [edi], eax
    jmp 7f
6:  add ebx, 8
    jmp 3b
7:  mov al, [esi]               # to the end of the word
    test al, al
    jz 9f
    cmp al, ' '
    je 1b
    inc esi
    jmp 7b
9:  ret

# Says what is wrong and halts, rather than run something else than what was asked for.
check_parameters:
    mov esi, offset text_bad_mib
    mov eax, [value_mib]
    test eax, eax
    jz 9f
    cmp eax, REGION_MIB_MAX
    ja 9f
    mov ecx, eax
    shl ecx, 8
    mov [region_pages], ecx
    mov ebx, [mbi]
    mov ecx, [ebx + 8]          # KiB above 1 MiB
    add eax, REGION / 0x100000 - 1
    shl eax, 10
    cmp eax, ecx
    ja 9f
    mov esi, offset text_bad_hz
    mov eax, [value_hz]
    cmp eax, 20
    jb 9f
    cmp eax, 1000
    ja 9f
    mov esi, offset text_bad_tick
    cmp dword ptr [value_tick], 0
    je 9f
    mov esi, offset text_bad_rate
    cmp dword ptr [value_rate], 10000000    # 20 interrupts of it fit 32 bits
    ja 9f
    mov esi, offset text_bad_seed
    cmp dword ptr [value_seed], 0
    je 9f
    mov eax, [value_zero]
    mov [until_zero], eax
    ret
9:  call print
    call print_newline
    jmp dead

# ---- machine -----------------------------------------------------------------------------------------------

# PIC at vectors 0x20 and 0x28 with only the timer open; PIT at `hz`.
interrupts_init:
    mov eax, offset timer_interrupt
    mov [idt + 0x20 * 8], ax
    mov word ptr [idt + 0x20 * 8 + 2], 0x08
    mov word ptr [idt + 0x20 * 8 + 4], 0x8e00
    shr eax, 16
    mov [idt + 0x20 * 8 + 6], ax
    lidt [idt_pointer]
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xfe
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    mov eax, PIT_HZ
    xor edx, edx
    div dword ptr [value_hz]
    mov ecx, eax
    mov al, 0x34                # channel 0, rate generator
    out 0x43, al
    mov eax, ecx
    out 0x40, al
    mov al, ah
    out 0x40, al
    ret

timer_interrupt:
    inc dword ptr [interrupts]
    push eax
    mov al, 0x20
    out 0x20, al
    pop eax
    iretd

serial_init:                    # 115200 8N1, FIFO, no interrupts
    mov dx, COM1 + 1
    xor eax, eax
    out dx, al
    mov dx, COM1 + 3
    mov al, 0x80
    out dx, al
    mov dx, COM1
    mov al, 1
    out dx, al
    mov dx, COM1 + 1
    xor eax, eax
    out dx, al
    mov dx, COM1 + 3
    mov al, 3
    out dx, al
    mov dx, COM1 + 2
    mov al, 7
    out dx, al
    ret

print_newline:
    mov al, 10
    # fall through

print_char:                     # al
    push edx
    push eax
    mov dx, COM1 + 5
1:  in al, dx
    test al, 0x20
    jz 1b
    pop eax
    mov dx, COM1
    out dx, al
    pop edx
    ret

print:                          # the NUL-ended text at esi
    mov al, [esi]
    test al, al
    jz 1f
    call print_char
    inc esi
    jmp print
1:  ret

print_number:                   # eax, decimal
    mov ecx, 10
    xor ebx, ebx
1:  xor edx, edx
    div ecx
    push edx
    inc ebx
    test eax, eax
    jnz 1b
2:  pop eax
    add al, '0'
    call print_char
    dec ebx
    jnz 2b
    ret

# ---- data --------------------------------------------------------------------------------------------------

.section .rodata
text_ready: .asciz "ready "
text_tick: .asciz "tick "
text_pages: .asciz " pages "
text_checked: .asciz " checked "
text_error: .asciz "error page "
text_quiet: .asciz "quiet"
text_bad_mib: .asciz "error: mib is 0 or more than this machine has"
text_bad_hz: .asciz "error: hz is not 20 to 1000"
text_bad_tick: .asciz "error: tick is 0"
text_bad_rate: .asciz "error: rate is more than 10000000"
text_bad_seed: .asciz "error: seed is 0"

.macro name_of parameter
name_\parameter: .asciz "\parameter="
.endm
name_of rate
name_of run
name_of mib
name_of soft
name_of zero
name_of fill
name_of hz
name_of tick
name_of check
name_of seed

.align 4
parameters:
    .long name_rate, value_rate, name_run, value_run, name_mib, value_mib, name_soft, value_soft
    .long name_zero, value_zero, name_fill, value_fill, name_hz, value_hz, name_tick, value_tick
    .long name_check, value_check, name_seed, value_seed, 0

.align 8
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
idt_pointer:
    .word 0x21 * 8 - 1
    .long idt

.data
value_rate: .long 0
value_run: .long 1
value_mib: .long 64
value_soft: .long 0
value_zero: .long 0
value_fill: .long 0
value_hz: .long 100
value_tick: .long 10
value_check: .long 8
value_seed: .long 1

.bss
.align 16
vector: .skip 16
idt: .skip 0x21 * 8
mbi: .skip 4
region_pages: .skip 4
next_page: .skip 4
run_left: .skip 4
until_zero: .skip 4
owed: .skip 4                   # pages due, in units of 1/hz
interrupts: .skip 4
interrupts_seen: .skip 4
interrupts_ticked: .skip 4
ticks: .skip 4
pages_written: .skip 4
pages_checked: .skip 4
.align 16
    .skip 4096
stack_top:
